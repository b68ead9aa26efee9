"""Dynamic grids of activations: one step (and zero point) per token, found from the token itself.

Symmetric: s = c·max|x|/(2^(b−1)−1), x̂ = s·clip(round(x/s), ±(2^(b−1)−1)). Asymmetric: the range [c·min x, c·max x],
widened to contain 0, in 2^b − 1 steps s with zero point z = round(−c·min x/s), x̂ = s·clip(round(x/s), −z, 2^b−1−z).
c is the clip ratio (DuQuant and QuaRot use 0.9). Rounding is half to even. A token of zeros has s = 1.

The same grid serves queries, keys and values, whose last axis is one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tulle.errors import UserError


@dataclass(frozen=True)
class TokenGrid:
    """Settings of a per-token grid: ``bits`` 2-8, ``clip`` in (0, 1]."""

    bits: int
    symmetric: bool = True
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(
                f"expected 2 to 8 bits for activations, found {self.bits}; 4, 6 and 8 are the usual choices"
            )
        if not 0 < self.clip <= 1:
            raise UserError(f"expected an activation clip above 0 and at most 1, found {self.clip}; try 0.9")

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers (float32 ``[..., C]``) and steps s (float32 ``[..., 1]``) of x ``[..., C]``: x̂ = s·whole.

        The whole numbers are signed codes, on an asymmetric grid with the zero point taken off: at most
        2^(b−1) − 1 in size on a symmetric grid, 2^b − 1 on an asymmetric one.
        """
        x = x.float()
        low, high, step = self.range(x)
        return (x / step).round().clamp(low, high), step

    def range(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest and largest whole number and the step, each float32 ``[..., 1]``, of float32 x ``[..., C]``."""
        if self.symmetric:
            top = (1 << (self.bits - 1)) - 1
            step = _positive(x.abs().amax(-1, keepdim=True) * self.clip / top)
            high = torch.full_like(step, top)
            return -high, high, step
        top = (1 << self.bits) - 1
        low = x.amin(-1, keepdim=True).clamp(max=0) * self.clip
        step = _positive((x.amax(-1, keepdim=True).clamp(min=0) * self.clip - low) / top)
        zero = (-low / step).round()
        return -zero, top - zero, step

    def fake(self, x: Tensor) -> Tensor:
        """x̂ in the shape and dtype of x."""
        codes, step = self.quantise(x)
        return (codes * step).to(x.dtype)


def _positive(step: Tensor) -> Tensor:
    return torch.where(step > 0, step, torch.ones_like(step))
