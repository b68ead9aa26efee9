"""Packs weights into the order that the kernels read: native/include/tulle/linear.hpp defines it, with pictures.

Rows come in tiles of 16, padded; the input channels of one scale in equal *segments* of at most 512, padded to whole
ones. In *tiles*, codes lie unit after unit: 4 inputs × 16 outputs, output major; bfloat16 2 × 16; float32 1 × 16. Dense
codes of 2 to 6 bits share bytes with those of other units of their *group*, and a segment is whole groups. A sparse
linear has a bit per weight in that order, and offsets to the kept values of every *chunk* (as many segments as
fit into 512 inputs).

*Input-major*, where tokens leave most inputs out: what one input multiplies of 64 bytes of outputs is a *cache line*;
up to 96 lines (2 bits: 48) are a *panel*, in which inputs follow each other. Where inputs are kept or dropped in blocks
of 4, such a block takes the place of an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.engine.checkpoint import StoredLinear
from tulle.engine.native_model import Layout, LinearFacts, ScaleKind, WeightKind

TILE = 16
CHUNK = 512
"""Input channels."""
SLACK = 64
"""Bytes behind the values that kernels may read."""
BLOCK = 64
"""Tiles that are converted at once: bounds the memory."""
PANEL_LINES = 96
"""Of 2-bit codes half as many."""
LINE_OUTPUTS = {WeightKind.CODES2: 256, WeightKind.CODES4: 128, WeightKind.CODES8: 64}
BITS = {
    WeightKind.CODES2: 2, WeightKind.CODES3: 3, WeightKind.CODES4: 4, WeightKind.CODES5: 5, WeightKind.CODES6: 6,
    WeightKind.CODES8: 8,
}  # fmt: skip
"""Of dense codes in tiles."""
GROUP_UNITS = {
    WeightKind.CODES2: 4, WeightKind.CODES3: 8, WeightKind.CODES4: 2, WeightKind.CODES5: 8, WeightKind.CODES6: 4,
    WeightKind.CODES8: 1,
}  # fmt: skip
"""Units that share bytes, in dense tiles."""
UNIT_INPUTS = dict.fromkeys(BITS, 4) | {WeightKind.BF16: 2, WeightKind.F32: 1}


class ModelLayout(StrEnum):
    """How the weights of a model are laid out: pruned ones left out or densified, in tiles or input-major."""

    SPARSE = "sparse"
    DENSE = "dense"
    INPUT_MAJOR = "input-major"
    DENSE_INPUT_MAJOR = "dense input-major"

    @property
    def densified(self) -> bool:
        return self in (ModelLayout.DENSE, ModelLayout.DENSE_INPUT_MAJOR)

    @property
    def input_major(self) -> bool:
        """Where a linear has input-major kernels; the others stay in tiles."""
        return self in (ModelLayout.INPUT_MAJOR, ModelLayout.DENSE_INPUT_MAJOR)


@dataclass(frozen=True)
class Geometry:
    """How a row of ``columns`` inputs with ``scales`` scales is cut."""

    rows: int
    columns: int
    segment: int
    """Inputs."""
    segments_per_scale: int
    scales: int
    line: int = TILE
    """Outputs that the rows are padded to a multiple of."""

    @property
    def segments(self) -> int:
        return self.scales * self.segments_per_scale

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.line) * (self.line // TILE)

    @property
    def padded(self) -> int:
        """Inputs."""
        return self.segments * self.segment

    @property
    def chunk_starts(self) -> NDArray[np.int64]:
        """First input of every chunk."""
        step = max(1, CHUNK // self.segment) * self.segment
        return np.arange(0, self.padded, step)


def geometry(shape: tuple[int, int], scales: int, line: int = TILE, step: int = 8) -> Geometry:
    """Cuts a row into segments of at most 512 inputs, multiples of ``step``, so that padding is least, then segments
    longest."""
    rows, columns = shape
    width = columns // scales
    candidates = range(step, min(CHUNK, -(-width // step) * step) + 1, step)
    segment = min(candidates, key=lambda s: (-(-width // s) * s, -s))
    return Geometry(rows, columns, segment, -(-width // segment), scales, line)


def _units(values: NDArray[Any], cut: Geometry, inputs: int) -> Iterator[NDArray[Any]]:
    """Weights ``[C_out, C_in]`` in the order of units of ``inputs`` inputs: ``[tiles, padded·16]``, by parts."""
    room = cut.segment * cut.segments_per_scale
    for first in range(0, cut.tiles, BLOCK):
        tiles = min(BLOCK, cut.tiles - first)
        rows = values[first * TILE : (first + tiles) * TILE]
        padded = np.zeros((tiles * TILE, cut.scales, room), values.dtype)
        padded[: len(rows), :, : cut.columns // cut.scales] = rows.reshape(len(rows), cut.scales, -1)
        yield padded.reshape(tiles, TILE, -1, inputs).transpose(0, 2, 1, 3).reshape(tiles, -1)


def _per_tile(values: NDArray[Any], cut: Geometry, input_major: bool) -> NDArray[Any]:
    """``[C_out, G]`` → ``[tiles, G, 16]``, input-major ``[G, tiles, 16]``, flat."""
    padded = np.zeros((cut.tiles * TILE, values.shape[1]), values.dtype)
    padded[: cut.rows] = values
    order = (2, 0, 1) if input_major else (0, 2, 1)
    return np.ascontiguousarray(padded.reshape(cut.tiles, TILE, -1).transpose(order)).reshape(-1)


def _stored(kind: WeightKind, units: NDArray[Any]) -> NDArray[np.uint8]:
    """Bytes of dense values: of codes those of a group's units together, as linear.hpp draws them."""
    if kind not in BITS or kind is WeightKind.CODES8:
        return np.ascontiguousarray(units).reshape(-1).view(np.uint8)
    u = units.reshape(-1, GROUP_UNITS[kind], 64).transpose(1, 0, 2)
    parts = {
        WeightKind.CODES2: lambda: [u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6],
        WeightKind.CODES3: lambda: [
            u[0] | u[1] << 3 | u[6] >> 1 << 6,
            u[2] | u[3] << 3 | u[7] >> 1 << 6,
            u[4] | u[5] << 3 | (u[6] & 1) << 6 | u[7] << 7,
        ],
        WeightKind.CODES4: lambda: [u[0] | u[1] << 4],
        WeightKind.CODES5: lambda: [
            u[0] | u[5] >> 2 << 5,
            u[1] | u[6] >> 2 << 5,
            u[2] | u[7] >> 2 << 5,
            u[3] | (u[7] & 1) << 5 | u[5] << 6,
            u[4] | (u[7] >> 1 & 1) << 5 | u[6] << 6,
        ],
        WeightKind.CODES6: lambda: [u[0] | u[3] >> 4 << 6, u[1] | u[3] >> 2 << 6, u[2] | u[3] << 6],
    }[kind]()
    return np.stack(parts, axis=1).reshape(-1)


def _kept(
    kind: WeightKind, units: NDArray[Any], kept: NDArray[np.bool_], starts: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bytes of what a sparse linear keeps of ``units [tiles, padded·16]``, and how many each chunk takes, ``starts``
    being the chunks' first weights.
    """
    if kind is not WeightKind.CODES4:
        counts = np.add.reduceat(kept, starts, axis=1, dtype=np.int64).reshape(-1)
        return units[kept].view(np.uint8), counts * units.itemsize
    pairs = kept.reshape(-1, 2, 64)
    widths = pairs.sum(2, dtype=np.int64).max(1)
    ends = np.cumsum(widths)
    places = np.cumsum(pairs, 2, dtype=np.int64) + (ends - widths - 1)[:, None, None]
    codes = units.reshape(-1, 2, 64)
    stored = np.zeros(ends[-1], np.uint8)
    stored[places[:, 0][pairs[:, 0]]] = codes[:, 0][pairs[:, 0]]
    stored[places[:, 1][pairs[:, 1]]] |= codes[:, 1][pairs[:, 1]] << 4
    return stored, np.add.reduceat(widths.reshape(len(units), -1), starts // 128, axis=1).reshape(-1)


def arrange(
    kind: WeightKind, values: NDArray[Any], mask: NDArray[np.bool_] | None, cut: Geometry
) -> dict[str, NDArray[Any]]:
    """``values`` and, where there is a mask, ``masks`` and ``offsets`` of a linear.

    values ``[C_out, C_in]``: uint8 codes, uint16 bits of bfloat16, or float32. mask ``[C_out, C_in]``: True = stored.
    """
    inputs = UNIT_INPUTS[kind]
    if mask is None:
        parts = [_stored(kind, units) for units in _units(values, cut, inputs)]
        return {"values": np.concatenate([*parts, np.zeros(SLACK, np.uint8)])}
    starts = cut.chunk_starts * TILE
    bits, parts, ends = [], [], [np.zeros(1, np.uint64)]
    for units, kept in zip(_units(values, cut, inputs), _units(mask, cut, inputs), strict=True):
        bits.append(np.packbits(kept.reshape(-1), bitorder="little"))
        stored, counts = _kept(kind, units, kept, starts)
        parts.append(stored)
        ends.append(ends[-1][-1] + np.cumsum(counts).astype(np.uint64))
    return {
        "masks": np.concatenate(bits),
        "values": np.concatenate([*parts, np.zeros(SLACK, np.uint8)]),
        "offsets": np.concatenate(ends),
    }


def _panels(values: NDArray[Any], cut: Geometry, most: int, inputs: int) -> Iterator[NDArray[Any]]:
    """Of ``[C_out, C_in]`` panel after panel of at most ``most`` lines: ``[padded, lines, line outputs / 64, 64]``, the
    64 outputs in the order of a line's bytes. With blocks of 4 ``inputs`` ``[padded / 4, 4·lines, ...]``, of a line one
    after another 16 of every 64 outputs × 4 inputs.
    """
    lines = cut.tiles * TILE // cut.line
    step = -(-lines // -(-lines // most)) * cut.line
    room = cut.segment * cut.segments_per_scale
    for first in range(0, cut.tiles * TILE, step):
        rows = values[first : first + step]
        count = min(step, cut.tiles * TILE - first)
        padded = np.zeros((count, cut.scales, room), values.dtype)
        padded[: len(rows), :, : cut.columns // cut.scales] = rows.reshape(len(rows), cut.scales, -1)
        if inputs == 4:
            units = padded.reshape(-1, cut.line // 64, 4, TILE, cut.padded // 4, 4)
            yield units.transpose(4, 0, 2, 1, 3, 5).reshape(cut.padded // 4, -1, cut.line // 64, 64)
            continue
        # Output 16·t + 4·q + i of 64 is byte 16·q + 4·t + i.
        split = padded.reshape(-1, cut.line // 64, 4, 4, 4, cut.padded)
        yield split.transpose(5, 0, 1, 3, 2, 4).reshape(cut.padded, -1, cut.line // 64, 64)


def arrange_input_major(
    kind: WeightKind, values: NDArray[np.uint8], mask: NDArray[np.bool_] | None, cut: Geometry, inputs: int = 1
) -> dict[str, NDArray[Any]]:
    """``values`` and, where there is a mask, ``offsets`` and ``starts`` of an input-major linear, in blocks of 1 or 4
    ``inputs``.

    values ``[C_out, C_in]``: codes; sparse ones of 4 bits.
    """
    most = PANEL_LINES // 2 if kind is WeightKind.CODES2 else PANEL_LINES
    bits = 8 * 64 // cut.line
    shifts = (np.arange(cut.line // 64) * bits).astype(np.uint8)[:, None]
    slack = np.zeros(SLACK, np.uint8)
    if mask is None:
        panels = _panels(values, cut, most, inputs)
        parts = [np.bitwise_or.reduce(codes << shifts, axis=2).reshape(-1) for codes in panels]
        return {"values": np.concatenate([*parts, slack])}
    parts, starts, ends = [], [], [0]
    for codes, kept in zip(_panels(values, cut, most, inputs), _panels(mask, cut, most, inputs), strict=True):
        columns, lines = codes.shape[:2]
        widths = kept.sum(3, dtype=np.int64).max(2)  # bytes of a line's codes
        begins = np.concatenate([[0], np.cumsum(16 * lines + widths.sum(1))])
        stored = np.zeros(begins[-1], np.uint8)
        bytes_of = begins[:-1, None]
        places = bytes_of + np.arange(16 * lines)
        stored[places] = np.packbits(kept.reshape(columns, -1), axis=1, bitorder="little")
        firsts = bytes_of + 16 * lines + np.cumsum(widths, axis=1) - widths
        at = firsts[:, :, None, None] + np.cumsum(kept, axis=3, dtype=np.int64) - 1
        for half in range(2):
            # Places of one half are all different.
            stored[at[:, :, half][kept[:, :, half]]] |= codes[:, :, half][kept[:, :, half]] << shifts[half]
        parts.append(stored)
        starts.append(begins.astype(np.uint32))
        ends.append(ends[-1] + int(begins[-1]))
    return {
        "values": np.concatenate([*parts, slack]),
        "offsets": np.array(ends, np.uint64),
        "starts": np.concatenate(starts),
    }


def input_major_kind(bits: int, sparse: bool) -> WeightKind:
    """How codes of so many bits are stored in input-major layouts."""
    return WeightKind.CODES2 if bits <= 2 and not sparse else WeightKind.CODES4 if bits <= 4 else WeightKind.CODES8


def tiles_kind(bits: int, sparse: bool, width: int) -> WeightKind:
    """How codes of so many bits with a scale per ``width`` inputs are stored in tiles: in the fewest bytes. Groups that
    are longer than a scale's inputs would be mostly padding, so that a wider kind may take less."""
    if sparse:
        return WeightKind.CODES4 if bits <= 4 else WeightKind.CODES8

    def cost(kind: WeightKind) -> tuple[int, int]:
        cut = geometry((1, width), 1, TILE, segment_step(kind))
        return cut.padded * BITS[kind], -BITS[kind]

    return min((kind for kind, stored in BITS.items() if stored >= bits), key=cost)


def segment_step(kind: WeightKind, sparse: bool = False) -> int:
    """What the inputs of a segment in tiles are a multiple of: those of whole groups of units, at least 8."""
    return 8 if sparse else max(8, 4 * GROUP_UNITS.get(kind, 1))


def for_kernels(stored: StoredLinear, block_inputs: int = 0) -> tuple[LinearFacts, dict[str, NDArray[Any]]]:
    """(facts, arrays) of a linear: in tiles (``block_inputs`` 0), or input-major in blocks of 1 or 4 inputs, of codes
    alone."""
    values, mask, bits = stored.values, stored.mask, stored.bits
    line, step = TILE, 8
    scales = 1 if stored.scale is None else stored.scale.shape[1]
    if bits is None:
        kind = WeightKind.BF16 if values.dtype == np.uint16 else WeightKind.F32
    elif block_inputs:
        kind = input_major_kind(bits, mask is not None)
        line = LINE_OUTPUTS[kind]
        stored = stored.with_whole_scales()
    else:
        kind = tiles_kind(bits, mask is not None, values.shape[1] // scales)
        step = segment_step(kind, mask is not None)
    cut = geometry((values.shape[0], values.shape[1]), scales, line, step)
    arrays = (
        arrange_input_major(kind, values, mask, cut, block_inputs) if block_inputs else arrange(kind, values, mask, cut)
    )
    zero = 0
    scale_kind = ScaleKind.BF16
    if stored.scale is not None:
        scale_kind = ScaleKind.of(stored.scale)
        arrays["scales"] = _bits(_per_tile(stored.scale, cut, block_inputs > 0))
    if stored.row_scale is not None:
        arrays["row_scales"] = np.zeros(cut.tiles * TILE, np.float32)
        arrays["row_scales"][: cut.rows] = stored.row_scale
    if stored.minimum is not None:
        arrays["minima"] = _bits(_per_tile(stored.minimum, cut, block_inputs > 0))
    if stored.zero_point is not None:
        arrays["zeros"] = _per_tile(stored.zero_point, cut, block_inputs > 0)
    elif bits is not None:
        zero = 1 << (bits - 1) if stored.zero is None else stored.zero
    layout = Layout.of(mask is not None, block_inputs)
    cuts = (cut.rows, cut.columns, cut.segment, cut.segments, cut.segments_per_scale)
    return LinearFacts(kind, layout, *cuts, zero, scale_kind), arrays


def _bits(numbers: NDArray[Any]) -> NDArray[Any]:
    """Half precision as uint16, which the engine's file and the kernels take."""
    return numbers.view(np.uint16) if numbers.dtype == np.float16 else numbers
