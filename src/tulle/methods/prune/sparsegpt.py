"""SparseGPT: Frantar & Alistarh 2023, "Massive Language Models Can Be Accurately Pruned in One-Shot".

Algorithm 1. Columns are visited from left to right; when a block of 128 is entered, its mask keeps the
entries with the largest w²/[H_F⁻¹]_jj of the block, over all rows together (section 3.3), or N of every M in
each row (section 3.4). With H⁻¹ = UᵀU that denominator is U_jj², and the error of a column is made up for by
the columns to its right: W_{:,k} −= (w_j − ŵ_j)/U_jj·U_jk. With ``bits`` the kept weights are rounded in the
same sweep (section 3.5, eq. 7).

Departures, each an option:
- ``refit`` (default on): the sweep's update serves all rows with one H⁻¹ and never touches columns on the
  left; after it the kept weights are fitted exactly, row by row (core.least_squares), or with ``bits`` their
  codes and steps are improved by coordinate descent (core.descent).
- ``swaps`` (default off) improves the mask for that fit (core.swaps).
- Channels without calibration data have score 0, so they are pruned first.
- A mask that exists is kept: its pruned entries count towards the sparsity.
- Grid steps are found before the sweep, on the entries the initial scores would keep, not while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core import compiled
from tulle.core.descent import descend
from tulle.core.grid import Grid, GroupSize, Quantised, code, find_steps
from tulle.core.hessian import Factor
from tulle.core.masks import Pattern, check_sparsity, keep, keep_pattern, largest, within
from tulle.core.swaps import check_swaps
from tulle.core.sweep import sweep
from tulle.methods.contract import Decision, LinearState, Statistic, Statistics
from tulle.methods.pruner import Pruner


def sparsegpt_score(weight: Tensor, diagonal: Tensor) -> Tensor:
    """w²/U_jj² ``[C_out, C_in]``; ``diagonal`` ``[C_in]`` is that of U, and infinite for channels without
    data.
    """
    return (weight / diagonal).square()


class _Pruner:
    """Chooses the mask block by block (or stripe by stripe) and rounds kept weights when there is a grid."""

    def __init__(
        self,
        shape: torch.Size,
        diagonal: Tensor,
        sparsity: float | None,
        pattern: Pattern | None,
        allowed: Tensor | None,
        quantised: Quantised | None,
    ) -> None:
        self.diagonal, self.sparsity, self.pattern, self.quantised = diagonal, sparsity, pattern, quantised
        self.allowed = None if allowed is None else allowed.T
        self.mask = torch.ones(shape[1], shape[0], dtype=torch.bool, device=diagonal.device)
        if quantised is not None:
            width = shape[1] // quantised.scale.shape[1]
            self.step, self.zero = (t.T.repeat_interleave(width, 0) for t in (quantised.scale, quantised.zero))

    def open_block(self, start: int, weight: Tensor) -> None:
        if self.sparsity is None:
            return
        end = start + weight.shape[0]
        allowed = self._allowed(start, end)
        score = within(sparsegpt_score(weight.T, self.diagonal[start:end]), allowed)
        # What all columns so far owe minus what earlier blocks pruned: the layer's total is exactly
        # round(s·n).
        count = round(self.sparsity * end * weight.shape[1]) - int((~self.mask[:start]).sum())
        mask = largest(score.flatten(), score.numel() - count).reshape(score.shape)
        self.mask[start:end] = within(mask, allowed).T

    def column(self, j: int, weight: Tensor) -> Tensor:
        if self.pattern is not None and j % self.pattern.m == 0:
            end = j + self.pattern.m
            allowed = self._allowed(j, end)
            score = within(sparsegpt_score(weight[: self.pattern.m].T, self.diagonal[j:end]), allowed)
            self.mask[j:end] = within(keep_pattern(score, self.pattern), allowed).T
        kept = weight[0]
        if self.quantised is not None:
            grid, step, zero = self.quantised.grid, self.step[j], self.zero[j]
            codes = code(kept, step, zero, grid)
            self.quantised.codes[:, j] = codes.to(torch.int16)
            kept = (codes - zero) * step
        return kept * self.mask[j]

    def _allowed(self, start: int, end: int) -> Tensor | None:
        return None if self.allowed is None else self.allowed[start:end].T


def sparsegpt(
    weight: Tensor,
    factor: Factor,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    allowed: Tensor | None = None,
    dead: Tensor | None = None,
    quantised: Quantised | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Ŵ and its mask, ``[C_out, C_in]``, for W ``[C_out, C_in]``, channels in their own order.

    Entries outside ``allowed`` are pruned in any case. ``dead`` ``[C_in]`` marks channels to prune first.
    ``quantised`` holds the grid's steps; its codes are filled in.
    """
    diagonal = 1 / factor.pivot
    if dead is not None:
        diagonal[dead] = torch.inf
    pruner = _Pruner(weight.shape, diagonal, sparsity, pattern, allowed, quantised)
    if pattern is not None:
        block = max(block // pattern.m, 1) * pattern.m  # a stripe must not straddle two blocks
    if not compiled.fits(weight, factor.feedback, allowed) or (pattern is not None and pattern.m > compiled.WIDEST):
        compressed = sweep(weight, factor.upper, pruner, block)
        return compressed, pruner.mask.T.contiguous()

    def choose(start: int, value: Tensor) -> Tensor:
        pruner.open_block(start, value)
        return pruner.mask[start : start + len(value)]

    return compiled.sweep_mask(
        weight, factor, quantised, allowed, None if sparsity is None else choose,
        None if pattern is None else (pattern.n, pattern.m), block, 1 / diagonal,
    )  # fmt: skip


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Prunes with error compensation, optionally quantising in the same sweep."""

    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    refit: bool = True
    """Fit the kept weights exactly after the sweep (with ``bits``: coordinate descent on codes and steps)."""
    bits: int | None = None
    """Round the kept weights to this many bits in the same sweep; null leaves them in floating point."""
    group_size: GroupSize = None
    """Input channels per step. ``auto`` (``auto-64``, ``auto-32``): the largest number of at most 128 (64, 32) that
    fits, for every linear (:func:`tulle.core.grid.fitting_group`). Null: one step per output channel."""
    symmetric: bool = True
    """True: codes lie around 0, no zero points; false: every step has a zero point of its own."""
    clip_search: int = 20
    """Clip ratios tried for every step, weighted by the Hessian's diagonal; 0 takes the extremes."""
    descent: int = 4
    """Sweeps of that coordinate descent."""
    block: int = 128
    """Columns whose mask is chosen together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_swaps(self.swaps, self.refit and self.bits is None)
        self._grid()

    @property
    def settles(self) -> frozenset[Decision]:  # type: ignore[override]
        return frozenset({"mask"} if self.bits is None else {"mask", "codes"})

    def _grid(self, columns: int | None = None) -> Grid | None:
        return None if self.bits is None else Grid.of(self.bits, self.group_size, self.symmetric, columns)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        super().validate(name, shape)
        if grid := self._grid(shape[1]):
            grid.check(name, shape[1])

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        hessian, grid = statistics.hessian, self._grid(linear.weight.shape[1])
        assert hessian is not None
        pattern = check_sparsity(self.sparsity, self.pattern)
        factor = hessian.factor(self.damping)
        linear.notes += hessian.remarks(self.damping, factor.damping)
        target, quantised = linear.weight, None
        if grid is not None:
            score = within(sparsegpt_score(target, 1 / factor.pivot), linear.mask)
            likely = within(keep(score, self.sparsity, pattern, "layer"), linear.mask)
            scale, zero = find_steps(target, grid, hessian.matrix.diagonal(), self.clip_search, likely)
            quantised = Quantised(grid, torch.zeros_like(target, dtype=torch.int16), scale, zero)
        weight, mask = sparsegpt(
            target, factor, sparsity=self.sparsity, pattern=pattern, allowed=linear.mask,
            dead=hessian.dead, quantised=quantised, block=self.block,
        )  # fmt: skip
        if quantised is None:
            return self.fit(linear, mask, hessian, factor.damping, weight)
        if self.refit:
            quantised = descend(target, quantised, hessian.damped(factor.damping), mask, self.descent)
        linear.quantised = quantised
        self.leave(linear, mask, quantised.dequantise(mask))
