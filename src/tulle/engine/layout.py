"""From the packed format to the layout that the kernels read (native/include/tulle/linear.hpp).

Rows come in tiles of 16, padded; the input channels of one scale in equal *segments* of at most 512, padded to whole
ones. Of a tile, codes stand unit after unit: 4 inputs × 16 outputs, output major; bfloat16 2 × 16; float32 1 × 16. A
sparse linear has a bit per weight in that order, and offsets to the kept values of every *chunk* (as many segments as
fit into 512 inputs). linear.hpp says how 4-bit codes share bytes.

Or by *columns*, where tokens leave most inputs out: what one input meets of 64 bytes of outputs is a *line*, all lines
of up to 96 (2 bits: 48) are a *strip*, in which inputs follow each other. Where inputs are kept or left out by fours, a
column is four inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 16
CHUNK = 512
"""Input channels."""
SLACK = 64
"""Bytes behind the values that kernels may read."""
BLOCK = 64
"""Tiles that are converted at once: bounds the memory."""
STRIP_LINES = 96
"""Of 2-bit codes half as many."""
LINE_OUTPUTS = {"codes2": 256, "codes4": 128, "codes8": 64}


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
    """Outputs that the rows are filled up to a multiple of."""

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


def geometry(shape: tuple[int, int], scales: int, line: int = TILE) -> Geometry:
    """Cuts a row into segments of at most 512 inputs so that padding is least, then segments longest."""
    rows, columns = shape
    width = columns // scales
    candidates = range(8, min(CHUNK, -(-width // 8) * 8) + 1, 8)
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


def _per_tile(values: NDArray[Any], cut: Geometry, by_columns: bool) -> NDArray[Any]:
    """``[C_out, G]`` → ``[tiles, G, 16]``, by columns ``[G, tiles, 16]``, flat."""
    padded = np.zeros((cut.tiles * TILE, values.shape[1]), values.dtype)
    padded[: cut.rows] = values
    order = (2, 0, 1) if by_columns else (0, 2, 1)
    return np.ascontiguousarray(padded.reshape(cut.tiles, TILE, -1).transpose(order)).reshape(-1)


def _stored(kind: str, units: NDArray[Any]) -> NDArray[np.uint8]:
    """Bytes of dense values. Nibbles of two consecutive units share bytes."""
    if kind == "codes4":
        pairs = units.reshape(-1, 2, 64)
        return (pairs[:, 0] | pairs[:, 1] << 4).reshape(-1)
    return np.ascontiguousarray(units).reshape(-1).view(np.uint8)


def _kept(
    kind: str, units: NDArray[Any], kept: NDArray[np.bool_], starts: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bytes of what a sparse linear keeps of ``units [tiles, padded·16]``, and how many each chunk takes, ``starts``
    being the chunks' first weights.
    """
    if kind != "codes4":
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


def arrange(kind: str, values: NDArray[Any], mask: NDArray[np.bool_] | None, cut: Geometry) -> dict[str, NDArray[Any]]:
    """``values`` and, where there is a mask, ``masks`` and ``offsets`` of a linear.

    values ``[C_out, C_in]``: uint8 codes, uint16 bits of bfloat16, or float32. mask ``[C_out, C_in]``: True = stored.
    """
    inputs = {"codes4": 4, "codes8": 4, "bf16": 2, "f32": 1}[kind]
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


def _strips(values: NDArray[Any], cut: Geometry, most: int, inputs: int) -> Iterator[NDArray[Any]]:
    """Of ``[C_out, C_in]`` strip after strip of at most ``most`` lines: ``[padded, lines, line outputs / 64, 64]``, the
    64 outputs in the order of a line's bytes. Of four ``inputs`` a column ``[padded / 4, 4·lines, ...]``, of a line one
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


def arrange_columns(
    kind: str, values: NDArray[np.uint8], mask: NDArray[np.bool_] | None, cut: Geometry, inputs: int = 1
) -> dict[str, NDArray[Any]]:
    """``values`` and, where there is a mask, ``offsets`` and ``starts`` of a linear by columns of 1 or 4 ``inputs``.

    values ``[C_out, C_in]``: codes; sparse ones of 4 bits.
    """
    most = STRIP_LINES // 2 if kind == "codes2" else STRIP_LINES
    bits = 8 * 64 // cut.line
    shifts = (np.arange(cut.line // 64) * bits).astype(np.uint8)[:, None]
    slack = np.zeros(SLACK, np.uint8)
    if mask is None:
        strips = _strips(values, cut, most, inputs)
        parts = [np.bitwise_or.reduce(codes << shifts, axis=2).reshape(-1) for codes in strips]
        return {"values": np.concatenate([*parts, slack])}
    parts, starts, ends = [], [], [0]
    for codes, kept in zip(_strips(values, cut, most, inputs), _strips(mask, cut, most, inputs), strict=True):
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


def columns_kind(bits: int, sparse: bool) -> str:
    """How codes of so many bits are stored by columns."""
    return "codes2" if bits <= 2 and not sparse else "codes4" if bits <= 4 else "codes8"


def integer_linear(
    bits: int,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint16],
    zero_point: NDArray[np.uint8] | None,
    mask: NDArray[np.bool_] | None,
    column_inputs: int = 0,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(facts, arrays) of a linear of codes u ``[C_out, C_in]``, bfloat16 scales ``[C_out, G]`` and zero points; in
    tiles (0) or by columns of 1 or 4 inputs."""
    shape = (codes.shape[0], codes.shape[1])
    if column_inputs:
        kind = columns_kind(bits, mask is not None)
        cut = geometry(shape, scale.shape[1], LINE_OUTPUTS[kind])
        arrays = arrange_columns(kind, codes, mask, cut, column_inputs)
    else:
        kind = "codes4" if bits <= 4 else "codes8"
        cut = geometry(shape, scale.shape[1])
        arrays = arrange(kind, codes, mask, cut)
    arrays["scales"] = _per_tile(scale, cut, column_inputs > 0)
    if zero_point is not None:
        arrays["zeros"] = _per_tile(zero_point, cut, column_inputs > 0)
    return _facts(kind, cut, mask, column_inputs) | {"zero": 0 if zero_point is not None else 1 << (bits - 1)}, arrays


def float_linear(
    values: NDArray[Any], mask: NDArray[np.bool_] | None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(facts, arrays) of a linear of uint16 bits of bfloat16 or float32 weights ``[C_out, C_in]``."""
    kind = "bf16" if values.dtype == np.uint16 else "f32"
    cut = geometry((values.shape[0], values.shape[1]), 1)
    return _facts(kind, cut, mask, 0) | {"zero": 0}, arrange(kind, values, mask, cut)


def _facts(kind: str, cut: Geometry, mask: NDArray[np.bool_] | None, column_inputs: int) -> dict[str, Any]:
    return {
        "kind": kind, "sparse": mask is not None, "by_columns": column_inputs > 0, "fours": column_inputs == 4,
        "rows": cut.rows, "columns": cut.columns, "segment": cut.segment, "segments": cut.segments,
        "segments_per_scale": cut.segments_per_scale,
    }  # fmt: skip
