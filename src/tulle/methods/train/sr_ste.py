"""N:M sparsity from scratch: STE, SR-STE and two successors.

With E the mask of the N largest |w| of every M consecutive input channels, recomputed in every step, the forward pass
uses W̃ = W ⊙ E and the gradient passes straight through to all of W (STE, Bengio et al. 2013).

**SR-STE** (Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", equation 8)
adds a decay of the pruned weights *to the gradient*, so that the optimizer scales it:

    g = ∂L/∂W̃ + λ·(1 − E) ⊙ W,   λ = 2e-4.

It is added once per optimizer step, after micro-batches are summed and processes averaged, and before clipping.
Metric: SAD, the fraction of mask bits that change from one step to the next.

**S-STE** (Hu et al. 2024): instead of a hard mask, soft thresholding by the (N+1)-th magnitude t of the group,
S(w) = sign(w)·max(|w| − t, 0), rescaled by β = ⟨W, S(W)⟩/‖S(W)‖² per matrix, which is taken once, before training.

**STEP** (Lu et al. 2023): trains densely for a fraction of the steps, then learns masks with Adam's variance frozen.
Departure: the variance is put back after each step, so that a step still sees its own g² with weight 1 − β₂.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.masks import Pattern, keep_pattern
from tulle.errors import UserError
from tulle.methods.train.effective import StraightThrough, install, remove
from tulle.methods.train.method import TrainingMethod, local, optimizer_state


def hard(weight: Tensor, pattern: Pattern) -> Tensor:
    """W ⊙ E ``[C_out, C_in]``, with E the N largest |w| of every M input channels."""
    return weight * keep_pattern(weight.abs(), pattern)


def soft(weight: Tensor, pattern: Pattern) -> Tensor:
    """S(W) ``[C_out, C_in]``: soft thresholding by the (N+1)-th magnitude of every M input channels."""
    if pattern.n == pattern.m:
        return weight
    groups = weight.reshape(*weight.shape[:-1], -1, pattern.m)
    threshold = groups.abs().kthvalue(pattern.m - pattern.n, dim=-1, keepdim=True).values
    return (groups.sign() * (groups.abs() - threshold).clamp_min(0)).reshape(weight.shape)


def scale_of(weight: Tensor, effective: Tensor) -> float:
    """β = ⟨W, S(W)⟩/‖S(W)‖², the least squares scale of S(W) to W; both ``[C_out, C_in]``."""
    return float((weight * effective).sum() / effective.square().sum().clamp_min(torch.finfo(weight.dtype).tiny))


@dataclass(eq=False)
class STE(TrainingMethod):
    """Trains with N:M masks that follow the weights.

    ``prepare`` raises ``UserError`` for linears whose input channels are no multiple of M.
    """

    settles: ClassVar[frozenset[str]] = frozenset({"mask", "forward"})

    pattern: str = "2:4"
    """N kept in every M consecutive input channels."""

    decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parsed = Pattern.parse(self.pattern)
        self.masks: dict[str, Tensor] = {}
        self._changed, self._counted = 0, 0

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        super().prepare(model, steps, linears)
        for name, linear in self.linears.items():
            self.parsed.check(name, linear.in_features)
            install(linear, partial(self._forward, name))
        self._update_masks()

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """f(W) ``[C_out, C_in]`` of the named linear."""
        return hard(weight, self.parsed)

    def _forward(self, name: str, weight: Tensor) -> Tensor:
        found: Tensor = StraightThrough.apply(weight, self.effective(name, weight.detach()))
        return found

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        for linear in self.linears.values():
            if self.decay and linear.weight.grad is not None:
                # Groups lie along the input channels and FSDP2 shards output channels: this part is enough.
                weight = local(linear.weight)
                pruned = weight * ~keep_pattern(weight.abs(), self.parsed)
                local(linear.weight.grad).add_(pruned, alpha=self.decay)

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        previous = dict(self.masks)
        self._update_masks()
        for name, mask in self.masks.items():
            self._changed += int((mask != previous[name]).sum())
            self._counted += mask.numel()

    @torch.no_grad()
    def _update_masks(self) -> None:
        self.masks = {
            name: keep_pattern(local(linear.weight).abs(), self.parsed) for name, linear in self.linears.items()
        }

    def metrics(self) -> dict[str, float]:
        """``sad``: fraction of mask bits that changed per step, the mean since last asked (of this process's part)."""
        found = {"sad": self._changed / max(self._counted, 1)}
        self._changed = self._counted = 0
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._update_masks()

    @torch.no_grad()
    def finish(self) -> None:
        for name, linear in self.linears.items():
            remove(linear)
            part = local(linear.weight)
            part.copy_(self.effective(name, part))


@dataclass(eq=False)
class SRSTE(STE):
    """STE with the decay of pruned weights in the gradient."""

    decay: float = 2e-4  # type: ignore[misc]
    """λ, the decay of the pruned weights that is added to the gradient."""


@dataclass(eq=False)
class SSTE(STE):
    """STE by soft thresholding with a fixed scale per matrix."""

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        super().prepare(model, steps, linears)
        self.scales = {
            name: scale_of(linear.weight.detach(), soft(linear.weight.detach(), self.parsed))
            for name, linear in self.linears.items()
        }
        """β by name."""

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return soft(weight, self.parsed) * self.scales[name]

    def state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(scale, dtype=torch.float64) for name, scale in self.scales.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.scales = {name: float(state[name]) for name in self.scales}


@dataclass(eq=False)
class STEP(SRSTE):
    """Dense training first, then SR-STE with Adam's variance frozen."""

    sharded: ClassVar[bool] = False

    dense: float = 0.2
    """Fraction of the steps before masks are learned (the paper finds the moment by watching the variance)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dense < 1:
            raise UserError(f"expected dense as a fraction of the steps in [0, 1), found {self.dense}; try 0.2")
        self.frozen: dict[str, Tensor] = {}
        self.step = 0

    @property
    def learning(self) -> bool:
        """Masks act."""
        return self.step >= round(self.dense * self.steps)

    def _forward(self, name: str, weight: Tensor) -> Tensor:
        return super()._forward(name, weight) if self.learning else weight

    def after_backward(self, step: int) -> None:
        if self.learning:
            super().after_backward(step)

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().after_step(step, optimizers)
        for name, linear in self.linears.items():
            variance = optimizer_state(linear.weight, optimizers).get("exp_avg_sq")
            if variance is None:
                raise UserError("expected AdamW for step, which freezes its variance, found another; optimizer: adamw")
            if self.learning:
                variance.copy_(self.frozen[name])
            elif step + 1 >= round(self.dense * self.steps):
                self.frozen[name] = variance.clone()
        self.step = step + 1

    def state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)} | {f"frozen.{name}": v for name, v in self.frozen.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.step = int(state["step"])
        self.frozen = {k.removeprefix("frozen."): v for k, v in state.items() if k.startswith("frozen.")}
