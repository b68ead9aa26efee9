"""Round-to-nearest: every weight to the nearest point of a grid, w ≈ Δ·(round(w/Δ) + z − z).

The data-free baseline (e.g. LLM.int8, Dettmers et al. 2022; ZeroQuant, Yao et al. 2022). With ``clip_search``
the step of each group is the one with the least squared error among that many clip ratios, instead of the
group's extremes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tulle.core.grid import (
    Format,
    Grid,
    GroupSize,
    Quantised,
    code,
    extremes,
    find_steps,
    grouped,
    row_chunks,
    stored_steps,
)
from tulle.core.token_grid import TokenGrid
from tulle.errors import UserError
from tulle.methods.contract import Decision, LinearState, Method, Statistics


def round_to_nearest(
    weight: Tensor,
    grid: Grid,
    clip_search: int = 0,
    mask: Tensor | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> Quantised:
    """Quantises W ``[C_out, C_in]``; ``mask`` entries that are False do not count in the search for steps. ``ranges``
    (low, high), ``[C_out, G]`` each, replaces the extremes.
    """
    scale, zero = find_steps(weight, grid, search=clip_search, mask=mask, ranges=ranges)
    scale, zero, row_scale = stored_steps(scale, zero, grid)
    codes = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
    for rows in row_chunks(weight):
        part = code(grouped(weight[rows], grid.group_size), scale[rows, :, None], zero[rows, :, None], grid)
        codes[rows] = part.reshape(-1, weight.shape[1]).to(torch.int16)
    return Quantised(grid, codes, scale, zero, row_scale)


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Rounds weights to ``bits``; keeps a mask that exists."""

    takes_tables: ClassVar[bool] = True

    bits: int = 8
    """Bits of a weight's code, 2 to 8."""
    group_size: GroupSize = None
    """Input channels per step. ``auto`` (``auto-64``, ``auto-32``): the largest number of at most 128 (64, 32) that
    fits, for every linear (:func:`tulle.core.grid.fitting_group`). Null: one step per output channel."""
    symmetric: bool = True
    """True: codes lie around 0, no zero points; false: every step has a zero point of its own."""
    scale_bits: Literal[8, 16] = 16
    """Bits of a step: 16 (bfloat16), or 8 with one bfloat16 per output channel."""
    format: Format = "int"
    """What codes are: whole numbers, or the floats of four bits of the standards mxfp4 (groups of 32, scales powers of
    two) and nvfp4 (groups of 16, scales E4M3). These need ``bits: 4`` and have their own group size."""
    clip_search: int = 0
    """Clip ratios tried for every step; 0 takes the extremes. Of mxfp4 and nvfp4: more than 0 tries the neighbours of
    the standard's scale."""
    clip: float = 1.0
    """Fixed ratio of the extremes (DuQuant without learned clipping takes 0.8)."""
    input_bits: Literal[4, 6, 8] | None = None
    """Quantise the linear's input per token, symmetric and dynamic; null leaves it alone. The step ``activations`` does
    the same before the statistics are taken, with more settings."""

    def __post_init__(self) -> None:
        self._grid()
        if not 0 < self.clip <= 1:
            raise UserError(f"expected a weight clip above 0 and at most 1, found {self.clip}; try 0.8")

    @property
    def settles(self) -> frozenset[Decision]:  # type: ignore[override]
        return frozenset({"codes"} if self.input_bits is None else {"codes", "inputs"})

    def _grid(self, columns: int | None = None) -> Grid:
        return Grid.of(self.bits, self.group_size, self.symmetric, columns, self.scale_bits, self.format)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self._grid(shape[1]).check(name, shape[1])

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        ranges, grid = linear.ranges, self._grid(linear.weight.shape[1])
        if ranges is None and self.clip < 1:
            ranges = extremes(linear.weight, grid, linear.mask)
        if ranges is not None:
            ranges = (ranges[0] * self.clip, ranges[1] * self.clip)
        linear.quantised = round_to_nearest(linear.weight, grid, self.clip_search, linear.mask, ranges)
        linear.weight = linear.quantised.dequantise(linear.mask)
        if self.input_bits is not None:
            linear.input_grid = TokenGrid(self.input_bits)
