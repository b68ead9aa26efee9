"""GPTQ: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for ...".

Columns are rounded one after the other; the error of column j is made up for by the columns to its right,
W_{:,k} −= (w_j − ŵ_j)/U_jj·U_jk with H⁻¹ = UᵀU (eqs 2-3 in the Cholesky form of section 3.3, blocks of columns).
``act_order`` visits channels by falling diagonal of H, as the authors' later code does.

Departures, each an option:
- ``clip_search``: steps with the least squared error weighted by diag(H), instead of each group's extremes.
  Steps are found before the sweep ("static groups"), so that groups stay contiguous under ``act_order``.
- ``descent``: after the sweep, coordinate descent over codes and steps on the exact layer objective
  (core.descent).
- A mask that exists is kept: pruned entries are compressed to zero like any other column, so that what the
  sweep moved into them is made up for by the columns on the right.
- ``format``: floats of four bits in place of whole numbers, as MR-GPTQ (Egiazarian et al. 2025, "Bridging the Gap
  Between Promising and Performance for Microscaling FP4 Quantization") has them; ``perq: {block: 32, permute: false}``
  before it is that paper's block rotation, and descent refits the scales.
- A channel without calibration data is rounded to nearest (the authors set its weights to zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tulle.core.descent import descend
from tulle.core.gptq import gptq
from tulle.core.grid import Format, Grid, GroupSize, find_steps
from tulle.core.hessian import check_damping
from tulle.core.token_grid import TokenGrid
from tulle.methods.contract import Decision, LinearState, Method, Statistic, Statistics


@dataclass(frozen=True)
class GPTQ(Method):
    """Rounds weights to ``bits`` with error compensation; keeps a mask that exists."""

    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    takes_tables: ClassVar[bool] = True

    bits: int = 4
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
    act_order: bool = True
    """Round the channels of the largest inputs first (falling diagonal of the Hessian)."""
    clip_search: int = 20
    """Clip ratios tried for every step; 0 takes the extremes. Of mxfp4 and nvfp4: more than 0 tries the neighbours of
    the standard's scale."""
    descent: int = 4
    """Sweeps of coordinate descent after GPTQ's own; 0 is the paper."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean; raised tenfold when the factorisation
    fails.
    """
    block: int = 32
    """Columns between two updates of the rest of the matrix; changes the speed alone."""
    input_bits: Literal[4, 6, 8] | None = None
    """Quantise the linear's input per token, symmetric and dynamic; null leaves it alone. The step ``activations`` does
    the same before the statistics are taken, with more settings."""

    def __post_init__(self) -> None:
        check_damping(self.damping)
        self._grid()

    @property
    def settles(self) -> frozenset[Decision]:  # type: ignore[override]
        return frozenset({"codes"} if self.input_bits is None else {"codes", "inputs"})

    def _grid(self, columns: int | None = None) -> Grid:
        return Grid.of(self.bits, self.group_size, self.symmetric, columns, self.scale_bits, self.format)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self._grid(shape[1]).check(name, shape[1])

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        hessian, grid = statistics.hessian, self._grid(linear.weight.shape[1])
        assert hessian is not None
        factor = hessian.factor(self.damping, self.act_order)
        linear.notes += hessian.remarks(self.damping, factor.damping)
        scale, zero = find_steps(
            linear.weight, grid, hessian.matrix.diagonal(), self.clip_search, linear.mask, ranges=linear.ranges
        )
        quantised = gptq(linear.weight, factor, grid, scale, zero, linear.mask, self.block)
        if self.descent:
            quantised = descend(linear.weight, quantised, hessian.damped(factor.damping), linear.mask, self.descent)
        linear.quantised = quantised
        linear.weight = quantised.dequantise(linear.mask)
        if self.input_bits is not None:
            linear.input_grid = TokenGrid(self.input_bits)
