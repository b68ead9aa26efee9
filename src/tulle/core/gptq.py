"""GPTQ's sweep: columns are rounded one after the other, and each one's error is made up for by those to its right.

Frantar, Ashkboos, Hoefler, Alistarh 2022, eqs 2-3 in the Cholesky form of section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core import compiled
from tulle.core.grid import Grid, Quantised, code, stored_steps
from tulle.core.hessian import Factor
from tulle.core.sweep import sweep


class _Rounder:
    """Rounds each column of the sweep to its group's grid."""

    def __init__(self, quantised: Quantised, order: Tensor, mask: Tensor | None) -> None:
        width = quantised.codes.shape[1] // quantised.scale.shape[1]
        self.quantised, self.channels, self.groups = quantised, order.tolist(), (order // width).tolist()
        self.step, self.zero = quantised.scale.T.contiguous(), quantised.zero.T.contiguous()
        self.mask = mask

    def open_block(self, start: int, weight: Tensor) -> None:
        """Nothing to choose per block."""

    def column(self, j: int, weight: Tensor) -> Tensor:
        channel, group = self.channels[j], self.groups[j]
        codes = code(weight[0], self.step[group], self.zero[group], self.quantised.grid)
        self.quantised.codes[:, channel] = codes.to(torch.int16)
        rounded = (codes - self.zero[group]) * self.step[group]
        return rounded if self.mask is None else rounded * self.mask[:, channel]


def gptq(
    weight: Tensor,
    factor: Factor,
    grid: Grid,
    scale: Tensor,
    zero: Tensor,
    mask: Tensor | None = None,
    block: int = 128,
) -> Quantised:
    """Quantises W ``[C_out, C_in]`` on a grid with steps and zero points ``[C_out, G]``, in the order of
    ``factor``. Steps of ``grid.scale_bits`` 8 are rounded to what can be stored first.
    """
    scale, zero, row_scale = stored_steps(scale, zero, grid)
    quantised = Quantised(grid, torch.zeros_like(weight, dtype=torch.int16), scale, zero, row_scale)
    if compiled.fits(weight, factor.feedback, scale, zero, mask, grid=grid):
        compiled.sweep_codes(weight, factor, quantised, mask, max(block, compiled.BLOCK))
    else:
        sweep(weight[:, factor.order], factor.upper, _Rounder(quantised, factor.order, mask), block)
    return quantised
