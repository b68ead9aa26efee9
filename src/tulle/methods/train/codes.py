"""Weights that are trained on their grid, with their mask held: Ŵ = Δ·(clip(round(W/Δ) + z) − z) ⊙ E.

Two ways to train a quantised linear, and one for a linear that is only pruned:

- :class:`TrainedCodes`: W is trained, Δ, z and E stay. The gradient passes straight through the rounding where W lies
  within the ends of its grid, and is 0 beyond (Bengio et al. 2013; the clipping as in Esser et al. 2020, "Learned Step
  Size Quantization", equation 3).
- :class:`TrainedSteps`: codes, z and E stay, every group's step is Δ·r with r trained. Ŵ is linear in r, so that only
  the rounding of the step to what the file stores is passed straight through.
- :class:`HeldWeight`: Ŵ = W ⊙ E.

``forward(dtype)`` gives Ŵ, ``result()`` what is to be stored in the end: Ŵ is the same number there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.grid import Grid, Quantised, code, grouped, row_chunks, storable_step


class TrainedCodes(nn.Module):
    """W ``[C_out, C_in]`` trained, codes anew at every call. ``mask`` bool ``[C_out, C_in]``, True = kept."""

    def __init__(self, start: Quantised, mask: Tensor | None):
        super().__init__()
        self.grid, self.scale, self.zero, self.row_scale = start.grid, start.scale, start.zero, start.row_scale
        self.mask = mask
        self.weight = nn.Parameter(start.dequantise(mask))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Ŵ in ``dtype``."""
        found: Tensor = _Rounded.apply(self.weight, self.scale, self.zero, self.grid, self.mask, dtype)
        return found

    @torch.no_grad()
    def result(self) -> Quantised:
        codes = torch.empty_like(self.weight, dtype=torch.int16)
        for rows in row_chunks(self.weight):
            found = code(*self._rows(rows), self.grid)
            codes[rows] = found.reshape(codes[rows].shape).to(torch.int16)
        return Quantised(self.grid, codes, self.scale, self.zero, self.row_scale)

    def _rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        width = self.weight.shape[1] // self.scale.shape[1]
        return grouped(self.weight[rows], width), self.scale[rows, :, None], self.zero[rows, :, None]


class TrainedSteps(nn.Module):
    """r ``[C_out, G]`` trained, 1 to begin with. Codes are asked for when they are needed: ``codes()`` gives the
    quantised weight and its mask, always the same."""

    def __init__(self, scale: Tensor, grid: Grid, row_scale: Tensor | None):
        super().__init__()
        self.scale, self.grid, self.row_scale = scale, grid, row_scale
        self.ratio = nn.Parameter(torch.ones_like(scale))

    def steps(self) -> Tensor:
        """Δ·r ``[C_out, G]``, as the file stores it."""
        exact = self.scale * self.ratio
        row = None if self.row_scale is None else self.row_scale[:, None]
        return exact + (storable_step(exact.detach(), row, self.grid) - exact).detach()

    def forward(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """Ŵ in ``dtype`` of the whole numbers ``[C_out, C_in]`` (q − z) ⊙ E, int16."""
        found: Tensor = _Stretched.apply(self.steps(), whole, dtype)
        return found

    @torch.no_grad()
    def result(self, start: Quantised) -> Quantised:
        return Quantised(self.grid, start.codes, self.steps(), start.zero, self.row_scale)


class HeldWeight(nn.Module):
    """W ``[C_out, C_in]`` trained where ``mask`` keeps it."""

    def __init__(self, weight: Tensor, mask: Tensor | None):
        super().__init__()
        self.mask = mask
        self.weight = nn.Parameter(weight)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Ŵ in ``dtype``."""
        return (self.weight if self.mask is None else self.weight * self.mask).to(dtype)


def whole_numbers(start: Quantised, mask: Tensor | None) -> Tensor:
    """(q − z) ⊙ E, int16 ``[C_out, C_in]``."""
    width = start.codes.shape[1] // start.zero.shape[1]
    whole = start.codes - start.zero.to(torch.int16).repeat_interleave(width, 1)
    return whole if mask is None else whole * mask


class _Rounded(torch.autograd.Function):
    """Ŵ of W; backward ∂L/∂W = ∂L/∂Ŵ where the grid reaches and the mask keeps."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid, mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        found = torch.empty_like(weight, dtype=dtype)
        passes = torch.empty_like(weight, dtype=torch.bool)
        width = weight.shape[1] // scale.shape[1]
        for rows in row_chunks(weight):
            step, z = scale[rows, :, None], zero[rows, :, None]
            free = (grouped(weight[rows], width) / step).round_().add_(z)
            reached = free.clamp(grid.low, grid.high)
            passes[rows] = (free == reached).reshape(passes[rows].shape)
            if grid.format != "int":
                reached = code(grouped(weight[rows], width), step, z, grid)
            # In float32 and rounded once, as the packed linear does.
            found[rows] = ((reached - z) * step).reshape(found[rows].shape).to(dtype)
        if mask is not None:
            found *= mask
            passes &= mask
        ctx.save_for_backward(passes)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None, None]:
        (passes,) = ctx.saved_tensors
        return gradients[0].float() * passes, None, None, None, None, None


class _Stretched(torch.autograd.Function):
    """Ŵ = Δ·whole, group by group; backward ∂L/∂Δ_g = Σ_j ∂L/∂Ŵ_j·whole_j."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(whole)
        ctx.groups = steps.shape[1]
        found = torch.empty(whole.shape, dtype=dtype, device=whole.device)
        width = whole.shape[1] // steps.shape[1]
        for rows in row_chunks(whole):
            found[rows] = (grouped(whole[rows], width) * steps[rows, :, None]).reshape(found[rows].shape).to(dtype)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (whole,) = ctx.saved_tensors
        gradient: Tensor = gradients[0]
        width = whole.shape[1] // ctx.groups
        found = torch.empty(whole.shape[0], ctx.groups, device=whole.device)
        for rows in row_chunks(whole):
            found[rows] = (grouped(gradient[rows].float(), width) * grouped(whole[rows], width)).sum(-1)
        return found, None, None
