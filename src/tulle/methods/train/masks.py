"""Sparse training with held masks, and gradual magnitude pruning.

**Held masks** ("Enabling High-Sparsity Foundational Llama Models", Agarwalla et al. 2024, section 3): a model that was
pruned goes on training with its zeros held. With E the mask, after every optimizer step W ← W ⊙ E; the gradient is
masked before it is clipped, so that the norm counts kept entries only and the optimizer's state of pruned entries stays
zero. Muon's update is dense even for a masked momentum, which is why the weight is masked after the step too.

**Gradual magnitude pruning** (Zhu & Gupta 2017, "To prune, or not to prune", equation 1), the baseline:
s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(n·Δt))³ at t = t₀, t₀ + Δt, …, t₀ + n·Δt; each time the smallest |w| of a layer
are pruned in addition. Departure: a pruned weight never comes back (theirs may, as its mask is computed anew).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.masks import Scope, keep_share, within
from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod, local, local_like, optimizer_state, whole
from tulle.methods.train.sparse_linear import densify, sparsify


@dataclass(eq=False)
class HeldMasks(TrainingMethod):
    """Holds the zeros that the targeted linears have when training begins.

    ``prepare`` raises ``UserError`` for a model without any.
    """

    settles: ClassVar[frozenset[str]] = frozenset({"mask"})

    native: bool = False
    """Compute with the kept entries only (``sparse_linear``: float32 on the CPU, one parameter vector per linear, which
    elementwise optimizers train as they would the masked matrix). Faster from about 60 % zeros on."""

    @property
    def sharded(self) -> bool:  # type: ignore[override]
        return not self.native

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        super().prepare(model, steps, linears)
        self.masks = {name: linear.weight.detach() != 0 for name, linear in self.linears.items()}
        """bool ``[C_out, C_in]``, True = kept; whole, also under FSDP2."""
        self._shards: dict[str, Tensor] = {}
        self._require_zeros()
        self._model = (model,)
        if self.native:
            for name, module in sparsify(model, self.masks).items():
                module.values.decays = True  # type: ignore[attr-defined]  # a matrix to weight decay, as one vector
                del self.linears[name]

    def _require_zeros(self) -> None:
        if self.pruned_fraction() == 0:
            raise UserError(
                "expected a model with pruned weights to hold, found none; prune first (a stage with prune:) or take "
                "gradual_magnitude"
            )

    def pruned_fraction(self) -> float:
        """Fraction of pruned weights in the targeted linears."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(total, 1)

    def shard(self, name: str) -> Tensor:
        """This process's part of a mask, bool; all of it ``[C_out, C_in]`` unless FSDP2 shards."""
        if name not in self._shards:
            weight = self.linears[name].weight
            self._shards[name] = local_like(self.masks[name].to(weight.device), weight)
        return self._shards[name]

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        for name, linear in self.linears.items():
            if linear.weight.grad is not None:
                local(linear.weight.grad).mul_(self.shard(name))

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for name, linear in self.linears.items():
            local(linear.weight).mul_(self.shard(name))

    @torch.no_grad()
    def tighten(self, masks: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Takes new masks, subsets of those held; newly pruned weights and their optimizer state become zero."""
        for name, mask in masks.items():
            weight = self.linears[name].weight
            self.masks[name] = mask & self.masks[name].to(mask.device)
            self._shards.pop(name, None)
            shard = self.shard(name)
            local(weight).mul_(shard)
            for value in optimizer_state(weight, optimizers).values():
                value.mul_(shard)

    def finish(self) -> None:
        if self.native:
            densify(self._model[0])

    def metrics(self) -> dict[str, float]:
        return {"sparsity": self.pruned_fraction()}

    def state(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name: state[name].to(mask.device) for name, mask in self.masks.items()}
        self._shards.clear()


@dataclass(eq=False)
class GradualMagnitude(HeldMasks):
    """Prunes the smallest weights step by step while training, and holds what is pruned.

    Raises ``UserError`` for settings outside their range, and where ``prepare`` is not told the number of steps.
    """

    sparsity: float = 0.5
    """s_f: fraction of pruned weights at the end, in every layer."""
    begin: float = 0.0
    """Fraction of the training at which pruning begins."""
    end: float = 0.7
    """Fraction of the training at which s_f is reached."""
    every: int = 50
    """Δt, optimizer steps between two prunings."""
    scope: Scope = "layer"
    """Where magnitudes are compared: over the whole matrix or within each output row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.native:
            raise UserError(
                "expected native: false for gradual_magnitude, whose masks change, found true; leave it out"
            )
        if not 0 < self.sparsity < 1:
            raise UserError(f"expected a sparsity between 0 and 1, found {self.sparsity}; try 0.5")
        if not 0 <= self.begin < self.end <= 1 or self.every < 1:
            raise UserError(
                f"expected 0 <= begin < end <= 1 and every >= 1, found {self.begin}, {self.end}, {self.every}; "
                "begin and end are fractions of the training"
            )

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        if steps < 1:
            raise UserError(
                "expected the number of steps for gradual_magnitude, found none; call prepare(model, steps)"
            )
        super().prepare(model, steps, linears)
        self.initial = self.pruned_fraction()

    def _require_zeros(self) -> None:
        """A dense model is fine here."""

    def scheduled(self, step: int) -> float | None:
        """The sparsity to prune to after step ``step``; None when it is not a step to prune at."""
        first, last = round(self.begin * self.steps), max(round(self.end * self.steps) - 1, 0)
        if step == last:
            return self.sparsity
        if step < first or step > last or (step - first) % self.every:
            return None
        return cubic(step, first, last, self.initial, self.sparsity)

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().after_step(step, optimizers)
        sparsity = self.scheduled(step)
        if sparsity is None:
            return
        found = {}
        for name, linear in self.linears.items():
            held = self.masks[name].to(linear.weight.device)
            found[name] = keep_share(within(whole(linear.weight).float().abs(), held), sparsity, self.scope)
        self.tighten(found, optimizers)


def cubic(step: int, first: int, last: int, initial: float, goal: float) -> float:
    """s_t of Zhu & Gupta, equation 1, for t = ``step`` between ``first`` and ``last``."""
    progress = (step - first) / max(last - first, 1)
    return goal + (initial - goal) * (1 - progress) ** 3
