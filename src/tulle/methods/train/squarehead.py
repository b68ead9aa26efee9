"""SquareHead distillation (Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of LLMs").

The student's hidden states h_s follow those of a dense, already fine-tuned teacher, h_t, layer by layer, each error
normalised by the size of the teacher's states (equation 2):

    L = CE + Σ_layers MSE(h_s, h_t) / (mean(h_t²) + ε) + kl·T²·KL(p_t ‖ p_s),

over tokens that are no padding. The cross-entropy is the loop's own loss. The teacher computes in bf16 without
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod


def normalised_error(student: Tensor, teacher: Tensor, real: Tensor, epsilon: float) -> Tensor:
    """MSE(h_s, h_t)/(mean(h_t²) + ε) for states ``[B, T, d]`` over the tokens that are ``real``, bool ``[B, T]``.

    With several processes both means are over the micro-batch of all of them: each returns its part, and the mean of
    the parts is the term.
    """
    s, t = student[real].float(), teacher[real].float()
    sums = torch.stack([t.square().sum().detach(), torch.tensor(float(t.numel()), device=t.device)])
    processes = 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
        processes = distributed.get_world_size()
    size, count = sums
    return processes * (s - t).square().sum() / count / (size / count + epsilon)


def divergence(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """T²·KL(p_t ‖ p_s) in nats per token, for logits ``[B, T, V]`` over the ``real`` tokens."""
    s = functional.log_softmax(student[real].float() / temperature, -1)
    t = functional.log_softmax(teacher[real].float() / temperature, -1)
    return temperature**2 * functional.kl_div(s, t, reduction="batchmean", log_target=True)


@dataclass(eq=False)
class SquareHead(TrainingMethod):
    """Adds the teacher's terms to the loss.

    Raises ``UserError`` for weights outside their range, without a teacher, and for one of another depth.
    """

    hidden_states: ClassVar[bool] = True

    teacher: str = ""
    """In a recipe: a model folder, or the name of an earlier stage. In Python call :meth:`teach` instead."""
    weight: float = 1.0
    """Weight of the layer-wise term."""
    kl: float = 0.0
    """Weight of the term on the logits."""
    temperature: float = 1.0
    """T, which divides the logits of both models."""
    epsilon: float = 1e-6
    """ε, added to the mean square of the teacher's states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0 or self.kl < 0 or self.temperature <= 0:
            raise UserError(
                "expected weight >= 0, kl >= 0 and temperature > 0 for squarehead, found "
                f"{self.weight}, {self.kl}, {self.temperature}; the paper's weight is 1"
            )
        # In a tuple, so that the teacher is nobody's submodule.
        self._teacher: tuple[nn.Module, ...] = ()
        self._sums: dict[str, float] = {}
        self._count = 0

    def teach(self, model: nn.Module) -> SquareHead:
        """Makes ``model`` the teacher: frozen, in bf16 (in place)."""
        self._teacher = (model.to(torch.bfloat16).requires_grad_(False).eval(),)
        return self

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        self.steps = steps
        if not self._teacher:
            raise UserError("expected a teacher of squarehead, found none; name one in the recipe or call teach(model)")

    def loss_terms(self, inputs: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
        device = next(teacher.parameters()).device
        if device != ids.device:
            teacher.to(ids.device)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            wanted = teacher(**given, use_cache=False, output_hidden_states=True)
        found: dict[str, Tensor] = {}
        if self.weight:
            found["squarehead"] = self.weight * self._layers(outputs.hidden_states, wanted.hidden_states, real)
        if self.kl:
            found["kl"] = self.kl * divergence(outputs.logits, wanted.logits, real, self.temperature)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._count += 1
        return found

    def _layers(self, student: Sequence[Tensor] | None, teacher: Sequence[Tensor], real: Tensor) -> Tensor:
        """Σ over the outputs of the decoder blocks; the first state is the embedding, which is no layer."""
        if student is None or len(student) != len(teacher):
            found = 0 if student is None else len(student) - 1
            raise UserError(
                f"expected the outputs of {len(teacher) - 1} layers as the teacher has, found {found}; take a teacher "
                "of the same depth, and call the model with output_hidden_states=True"
            )
        errors = [normalised_error(s, t, real, self.epsilon) for s, t in zip(student[1:], teacher[1:], strict=True)]
        return torch.stack(errors).sum()

    def metrics(self) -> dict[str, float]:
        found = {name: value / max(self._count, 1) for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return found
