"""Grids: step, zero point, rounding, groups along the input channels.

A b-bit grid of whole numbers has 2^b levels. Symmetric: w = Δ·q with q in [−2^(b−1), 2^(b−1)−1]; asymmetric: w =
Δ·(u − z) with u in [0, 2^b−1]. Grids of floats (MXFP4, NVFP4: :mod:`tulle.core.float4`) are symmetric with the eight
magnitudes 0, 1, 2, 3, 4, 6, 8 and 12 for q. Steps are rounded to what the file stores *before* weights are coded: to
bfloat16, to whole numbers of one byte times a bfloat16 per output channel, or to the byte of a format of floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from tulle.core import compiled, float4
from tulle.errors import UserError

SMALLEST_STEP = 1e-30
"""Steps of all-zero groups: any positive number that bfloat16 holds; their codes are all zero."""
GroupSize = int | Literal["auto", "auto-64", "auto-32"] | None
"""What a recipe may say: input channels per step; ``auto``, the largest fitting group of at most 128 (64, 32) for every
linear (:func:`fitting_group`); None: one step per output channel."""
Format = Literal["int"] | float4.FloatFormat
"""What codes are: whole numbers, or floats of four bits (:mod:`tulle.core.float4`)."""
SMALLEST_GROUP = 32
"""Below this many weights to a step, 16-bit steps weigh as much as the codes."""


def fitting_group(columns: int, most: int = 128) -> int | None:
    """The largest power of two of at most ``most`` that divides ``columns`` input channels: what readers have kernels
    for. Where that is under 32, the largest divisor of at most ``most``; where that is under 32 too, None: one step
    per output channel.
    """
    power = min(columns & -columns, 1 << (most.bit_length() - 1))
    if power >= SMALLEST_GROUP:
        return power
    return next((g for g in range(most, SMALLEST_GROUP - 1, -1) if columns % g == 0), None)


def is_automatic(group_size: GroupSize) -> bool:
    """Whether every linear gets a group size of its own."""
    return isinstance(group_size, str)


@dataclass(frozen=True)
class Grid:
    """Settings of a grid: ``bits`` 2-8, ``group_size`` input channels per step (None: one per output
    channel), ``scale_bits`` of a step: 16, or 8 times one number per output channel. A ``format`` of floats has 4 bits,
    its own group size, and steps of 8 bits.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_bits: int = 16
    format: Format = "int"

    def __post_init__(self) -> None:
        if self.format != "int":
            self._require_standard(self.format)
        if self.scale_bits not in (8, 16):
            raise UserError(f"expected scale_bits of 8 or 16, found {self.scale_bits}")
        if not 2 <= self.bits <= 8:
            raise UserError(f"expected 2 to 8 bits, found {self.bits}; 4 and 8 are the usual choices")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(
                f"expected a positive group_size, found {self.group_size}; leave it out for one step per output channel"
            )

    def _require_standard(self, form: float4.FloatFormat) -> None:
        fixed = {"bits": 4, "group_size": float4.GROUP[form], "symmetric": True, "scale_bits": 8}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"expected {name} {str(value).lower()} with format {form}, found {getattr(self, name)}; leave "
                    f"{name} out" + (" or say bits: 4" if name == "bits" else "")
                )

    @classmethod
    def of(
        cls,
        bits: int,
        group_size: GroupSize,
        symmetric: bool,
        columns: int | None = None,
        scale_bits: int = 16,
        format: Format = "int",
    ) -> Grid:
        """The grid of a linear with ``columns`` input channels. Without them, ``auto`` counts as no groups: enough to
        refuse impossible settings. A ``format`` of floats has its own group size where none is given or ``auto``."""
        if format != "int":
            size = float4.GROUP[format] if group_size is None or isinstance(group_size, str) else group_size
            return cls(bits, size, symmetric, 8, format)
        if isinstance(group_size, str):
            most = int(group_size.partition("-")[2] or 128)
            group_size = None if columns is None else fitting_group(columns, most)
        return cls(bits, group_size, symmetric, scale_bits)

    def check(self, name: str, columns: int) -> None:
        """Raises ``UserError`` when ``columns`` input channels do not split into groups."""
        if self.group_size is not None and columns % self.group_size:
            if self.format != "int":
                raise UserError(
                    f"{name}: expected a number of input channels divisible by {self.group_size} for {self.format}, "
                    f"found {columns}; use format: int for it"
                )
            raise UserError(
                f"{name}: expected a number of input channels divisible by group_size {self.group_size}, "
                f"found {columns}; {try_instead([columns])}"
            )

    @property
    def low(self) -> int:
        """Smallest code."""
        if self.format != "int":
            return -float4.LARGEST
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest code."""
        if self.format != "int":
            return float4.LARGEST
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


def try_instead(widths: Sequence[int]) -> str:
    """What a message says to do about a group size that does not divide these numbers of input channels."""
    fits = [str(g) for g in (256, 128, 64, 32, 16, 8) if all(width % g == 0 for width in widths)]
    which = f"{', '.join(fits)}, or auto" if fits else "auto"
    return f"use group_size {which}, or leave it out for one step per output channel"


@dataclass
class Quantised:
    """Codes and their grid: weight = scale·(codes − zero), group by group."""

    grid: Grid
    codes: Tensor
    """int16 ``[C_out, C_in]`` in [grid.low, grid.high]; at pruned positions the value has no meaning. Of a format of
    floats: levels, twice the numbers."""
    scale: Tensor
    """float32 ``[C_out, G]``: exact in bfloat16, or whole numbers of 1 to 255 times ``row_scale``. Of a format of
    floats: steps, half the scales."""
    zero: Tensor
    """float32 ``[C_out, G]``: integers in [0, 2^b−1], all zero on a symmetric grid."""
    row_scale: Tensor | None = None
    """float32 ``[C_out]``, exact in bfloat16, where ``grid.scale_bits`` is 8: of whole numbers each row's own, of nvfp4
    the same in all rows (half the tensor's scale), of mxfp4 None."""

    def dequantise(self, mask: Tensor | None = None) -> Tensor:
        """``[C_out, C_in]`` float32; zeros where ``mask`` is False."""
        width = self.codes.shape[1] // self.scale.shape[1]
        w = torch.empty(self.codes.shape, device=self.codes.device)
        for rows in row_chunks(w):
            whole = grouped(self.codes[rows], width).float() - self.zero[rows, :, None]
            torch.mul(whole, self.scale[rows, :, None], out=grouped(w[rows], width))
        return w if mask is None else w * mask


def steps(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Step Δ and zero point z of ranges [low, high] (any shape), Δ rounded to bfloat16.

    Symmetric: Δ = max(|low|, |high|)/(2^(b−1)−1), z = 0. Asymmetric: the range is widened to contain 0,
    Δ = (high−low)/(2^b−1), z = −round(low/Δ).
    """
    if grid.symmetric:
        step = torch.maximum(low.abs(), high.abs()) / grid.high
        step = to_bfloat16(step)
        return step, torch.zeros_like(step)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = to_bfloat16((high - low) / grid.high)
    return step, (-low / step).round().clamp(0, grid.high)


def to_bfloat16(step: Tensor) -> Tensor:
    """Nearest bfloat16 as float32; zero becomes the smallest step."""
    return step.clamp(min=SMALLEST_STEP).bfloat16().float()


def byte_steps(step: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Steps and zero points ``[C_out, G]`` as ``scale_bits`` 8 stores them, and ``row_scale`` ``[C_out]``.

    The row's largest step is 255 times its row scale or a little less, every other one the nearest whole number. Zero
    points move with their step, so that the least weight of a group stays where it was.
    """
    largest = step.amax(1)
    row = to_bfloat16(largest / 255)
    row = torch.where(row * 255 < largest, to_bfloat16(row * (1 + 2**-7)), row)
    rounded = nearest_step(step, row[:, None])
    moved = zero if grid.symmetric else (zero * step / rounded).round().clamp(0, grid.high)
    return rounded, moved, row


def nearest_step(step: Tensor, row_scale: Tensor) -> Tensor:
    """The nearest of 1 to 255 times ``row_scale`` (shapes broadcast)."""
    return (step / row_scale).round().clamp(1, 255) * row_scale


def stored_steps(step: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps and zero points ``[C_out, G]`` of :func:`find_steps` as the file has them, and ``row_scale`` ``[C_out]``
    where there is one."""
    if grid.format == "nvfp4":
        row = float4.tensor_step(step).expand(len(step)).contiguous()
        return storable_step(step, row[:, None], grid), zero, row
    if grid.format == "int" and grid.scale_bits == 8:
        return byte_steps(step, zero, grid)
    return step, zero, None


def joined(parts: Sequence[Quantised]) -> Quantised:
    """Quantised rows, one part's below another's. Tensors of nvfp4 have one scale, the largest part's; the steps of
    the others are rounded to it."""
    first, rows = parts[0], [part.row_scale for part in parts if part.row_scale is not None]
    scale, row_scale = torch.cat([part.scale for part in parts]), torch.cat(rows) if rows else None
    if row_scale is not None and first.grid.format == "nvfp4":
        row_scale = row_scale.amax().expand(len(row_scale)).contiguous()
        scale = storable_step(scale, row_scale[:, None], first.grid)
    codes, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "zero"))
    return Quantised(first.grid, codes, scale, zero, row_scale)


def storable_step(step: Tensor, row_scale: Tensor | None, grid: Grid) -> Tensor:
    """The nearest steps that can be stored: in bfloat16, of 8 bits times ``row_scale`` (shapes broadcast), or a float
    format's."""
    if grid.format != "int":
        return float4.storable_step(step, row_scale, grid.format)
    return to_bfloat16(step) if row_scale is None else nearest_step(step, row_scale)


def code(w: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes round(w/Δ) + z, clipped to the grid; float32 of whole numbers, shapes broadcast."""
    if grid.format != "int":
        return float4.nearest_level(w / step)
    return ((w / step).round() + zero).clamp(grid.low, grid.high)


def round_to_grid(w: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest point of the grid, Δ·(code − z)."""
    return (code(w, step, zero, grid) - zero) * step


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum with one of them in it is not finite, and takes a tenth of the time of looking at every element.
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


CACHED = 1 << 20
"""Elements of a chunk of rows that stay in cache from one operation to the next."""


def row_chunks(w: Tensor) -> Iterator[slice]:
    """Slices of the rows of W ``[C_out, C_in]`` that are small enough for the cache."""
    rows = max(1, CACHED // w.shape[1])
    for start in range(0, w.shape[0], rows):
        yield slice(start, start + rows)


def grouped(w: Tensor, group_size: int | None) -> Tensor:
    """View ``[C_out, C_in]`` as ``[C_out, G, C_in/G]``."""
    rows, columns = w.shape
    return w.reshape(rows, -1, group_size or columns)


def extremes(w: Tensor, grid: Grid, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and largest weight of each group, ``[C_out, G]`` each; 0 where ``mask`` is False."""
    g = grouped(w if mask is None else w * mask, grid.group_size)
    low, high = g.aminmax(dim=-1)
    return low, high


def find_steps(
    w: Tensor,
    grid: Grid,
    importance: Tensor | None = None,
    search: int = 0,
    mask: Tensor | None = None,
    norm: float = 2.0,
    ranges: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Step and zero point ``[C_out, G]`` for W ``[C_out, C_in]``.

    ``search`` = 0 takes the extremes of each group. Otherwise that many clip ratios from 1 down to 0.5 are
    tried and the one with the least Σ_j importance_j·|w_j − ŵ_j|^norm is kept, group by group. On a grid of floats
    0 is the standard's rule, and any other number tries all neighbouring scales. ``importance``
    ``[C_in]`` is the diagonal of the Hessian (None: ones); positions outside ``mask`` do not count. ``ranges`` (low,
    high), ``[C_out, G]`` each, replaces the extremes.
    """
    ratios = [1 - 0.5 * i / search for i in range(search)]
    if search and norm == 2 and compiled.fits(w, mask, *(ranges or ()), grid=grid):
        ones = torch.ones(w.shape[1]) if importance is None else importance
        return compiled.find_steps(w, grid, ones, torch.tensor(ratios), mask, ranges)
    low, high = extremes(w, grid, mask) if ranges is None else ranges
    candidates = _candidates(low, high, grid, ratios)
    best_step, best_zero = first = next(candidates)
    if search == 0:
        return best_step, best_zero
    g = grouped(w, grid.group_size)
    weight = torch.ones_like(w) if importance is None else importance.expand_as(w)
    if mask is not None:
        g, weight = g * grouped(mask, grid.group_size), weight * mask
    weight = grouped(weight, grid.group_size)
    best = torch.full_like(best_step, torch.inf)
    for step, zero in chain((first,), candidates):
        q = round_to_grid(g, step[..., None], zero[..., None], grid)
        error = (weight * (g - q).abs().pow(norm)).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_step = torch.where(better, step, best_step)
        best_zero = torch.where(better, zero, best_zero)
    return best_step, best_zero


def _candidates(low: Tensor, high: Tensor, grid: Grid, ratios: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps and zero points that a search tries, those of the whole ranges first."""
    if grid.format != "int":
        for step in float4.candidates(torch.maximum(low.abs(), high.abs()), grid.format, len(ratios) > 0):
            yield step, torch.zeros_like(step)
        return
    for ratio in ratios or (1.0,):
        yield steps(low * ratio, high * ratio, grid)
