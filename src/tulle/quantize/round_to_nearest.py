"""Round-to-nearest: every weight to the nearest point of a uniform grid, w ≈ Δ·(round(w/Δ) + z − z).

The data-free baseline (e.g. LLM.int8, Dettmers et al. 2022; ZeroQuant, Yao et al. 2022). With ``clip_search``
the step of each group is the one with the least squared error among that many clip ratios, instead of the
group's extremes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tulle.core.contract import LinearState, Method, Statistics
from tulle.core.grid import Grid, Quantised, code, find_steps, grouped


def round_to_nearest(weight: Tensor, grid: Grid, clip_search: int = 0, mask: Tensor | None = None) -> Quantised:
    """Quantises W ``[C_out, C_in]``; ``mask`` entries that are False do not count in the search for steps."""
    scale, zero = find_steps(weight, grid, search=clip_search, mask=mask)
    codes = code(grouped(weight, grid.group_size), scale[..., None], zero[..., None], grid)
    return Quantised(grid, codes.reshape(weight.shape).to(torch.int16), scale, zero)


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Rounds weights to ``bits``; keeps a mask that exists."""

    bits: int = 8
    group_size: int | None = None
    """Input channels per step; None: one step per output channel."""
    symmetric: bool = True
    clip_search: int = 0
    """Clip ratios tried for every step; 0 takes the extremes."""
    input_bits: Literal[8] | None = None
    """Quantise the linear's input per token, symmetric and dynamic; None leaves it alone."""

    def __post_init__(self) -> None:
        self._grid()

    def _grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self._grid().check(name, shape[1])

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        linear.quantised = round_to_nearest(linear.weight, self._grid(), self.clip_search, linear.mask)
        linear.weight = linear.quantised.dequantise(linear.mask)
        linear.input_bits = self.input_bits
