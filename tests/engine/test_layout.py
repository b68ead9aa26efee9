"""The kernel layout against its definition, read back weight by weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dense_codes import in_order_of_units
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tulle.engine.checkpoint import StoredLinear
from tulle.engine.layout import (
    LINE_OUTPUTS,
    SLACK,
    TILE,
    UNIT_INPUTS,
    Geometry,
    arrange,
    arrange_input_major,
    for_kernels,
    geometry,
    segment_step,
    tiles_kind,
)
from tulle.engine.native_model import Layout, ScaleKind, WeightKind


def read_back(kind: str, cut: Geometry, arrays: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Weights ``[C_out, C_in]`` and which of them are stored, one at a time as linear.hpp says."""
    inputs = UNIT_INPUTS[WeightKind(kind)]
    dtype = {"bf16": np.uint16, "f32": np.float32}.get(kind, np.uint8)
    sparse = "masks" in arrays
    codes = in_order_of_units(kind, arrays["values"][:-SLACK]) if kind.startswith("codes") and not sparse else None
    found = np.zeros((cut.tiles * TILE, cut.padded), dtype)
    stored = np.ones(found.shape, bool)
    chunk = max(1, 512 // cut.segment) * cut.segment * TILE
    chunks = -(-cut.padded * TILE // chunk)
    for tile in range(cut.tiles):
        for i in range(cut.padded * TILE):
            place = tile * cut.padded * TILE + i
            unit, within = divmod(i, TILE * inputs)
            row, column = tile * TILE + within // inputs, unit * inputs + within % inputs
            number, run = place, arrays["values"][:-SLACK]
            if sparse:
                if i % chunk == 0:
                    number_kept, start = 0, int(arrays["offsets"][tile * chunks + i // chunk])
                    of_pair = [0, 0]
                elif kind == "codes4" and i % 128 == 0:
                    start += max(of_pair)
                    of_pair = [0, 0]
                stored[row, column] = arrays["masks"][place // 8] >> (place % 8) & 1
                if not stored[row, column]:
                    continue
                number, run = number_kept, run[start:]
                number_kept += 1
            if kind == "codes4" and sparse:
                odd = i // 64 % 2
                found[row, column] = run[of_pair[odd]] >> (odd * 4) & 15
                of_pair[odd] += 1
            elif codes is not None:
                found[row, column] = codes[number]
            else:
                size = np.dtype(dtype).itemsize
                found[row, column] = run[number * size : (number + 1) * size].view(dtype)[0]
    room = cut.segment * cut.segments_per_scale
    width = cut.columns // cut.scales
    columns = np.concatenate([np.arange(s * room, s * room + width) for s in range(cut.scales)])
    padding = np.delete(found, columns, axis=1)
    assert not padding.any()
    return found[: cut.rows][:, columns], stored[: cut.rows][:, columns]


KINDS = [
    *((kind, density) for kind in ("codes4", "codes8", "bf16", "f32") for density in (None, 0.0, 0.3, 1.0)),
    *((kind, None) for kind in ("codes2", "codes3", "codes5", "codes6")),
]


@pytest.mark.parametrize(("kind", "density"), KINDS)
@pytest.mark.parametrize(("shape", "scales"), [((18, 40), 1), ((5, 96), 3), ((33, 600), 1), ((16, 72), 6), ((2, 7), 1)])
def test_every_weight_is_where_the_kernels_look(
    kind: str, density: float | None, shape: tuple[int, int], scales: int
) -> None:
    generator = np.random.default_rng(0)
    cut = geometry(shape, scales, step=segment_step(WeightKind(kind), density is not None))
    if kind.startswith("codes"):
        values: NDArray[Any] = generator.integers(0, 1 << int(kind[-1]), shape, np.uint8)
    else:
        values = generator.standard_normal(shape, np.float32)
        values = (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else values
    mask = None if density is None else generator.random(shape) < density
    found, stored = read_back(kind, cut, arrange(WeightKind(kind), values, mask, cut))
    kept = np.ones(shape, bool) if mask is None else mask
    assert np.array_equal(stored, kept)
    assert np.array_equal(found[kept], values[kept])


@given(st.integers(1, 40), st.integers(1, 1200), st.integers(1, 3), st.sampled_from([8, 16, 32]))
def test_geometry(rows: int, width: int, scales: int, step: int) -> None:
    cut = geometry((rows, width * scales), scales, step=step)
    assert cut.segment % step == 0 and step <= cut.segment <= 512
    room = cut.segment * cut.segments_per_scale
    assert room >= width and room - width < max(step * cut.segments_per_scale, step)


def test_codes_take_the_fewest_bytes() -> None:
    for bits, kind in ((2, "codes2"), (3, "codes3"), (4, "codes4"), (5, "codes5"), (6, "codes6"), (7, "codes8")):
        assert tiles_kind(bits, False, 128) == kind
    assert tiles_kind(3, False, 16) == "codes4"  # a group of 32 inputs would be half padding
    assert tiles_kind(5, False, 16) == "codes6"
    assert tiles_kind(6, False, 24) == "codes8"
    assert (tiles_kind(3, True, 128), tiles_kind(5, True, 128)) == ("codes4", "codes8")


def test_real_widths_are_not_padded() -> None:
    for width in (2048, 4096, 5632, 11008, 14336, 896, 4864, 128, 64):
        assert geometry((16, width), 1).padded == width


def test_facts_of_linears() -> None:
    codes, scale = np.zeros((20, 64), np.uint8), np.zeros((20, 2), np.uint16)
    facts, arrays = for_kernels(StoredLinear(codes, None, 3, scale))
    assert (facts.kind, facts.zero, facts.segments_per_scale) == (WeightKind.CODES3, 4, 1)
    assert arrays["scales"].shape == (2 * 2 * 16,)
    facts, arrays = for_kernels(StoredLinear(codes, None, 8, scale[:, :1], np.ones((20, 1), np.uint8)))
    assert (facts.kind, facts.zero) == (WeightKind.CODES8, 0)
    assert np.array_equal(arrays["zeros"], [1] * 20 + [0] * 12)
    bytes_of_scales, rows = scale.astype(np.uint8) + 3, np.arange(20, dtype=np.float32)
    facts, arrays = for_kernels(StoredLinear(codes, None, 3, bytes_of_scales, row_scale=rows))
    assert (facts.scale_kind, arrays["scales"].dtype) == (ScaleKind.U8, np.uint8)
    assert np.array_equal(arrays["row_scales"], [*range(20), *[0] * 12])
    facts, arrays = for_kernels(StoredLinear(codes, None, 3, bytes_of_scales, row_scale=rows), 1)
    assert (facts.scale_kind, "row_scales" in arrays) == (ScaleKind.F32, False)
    assert np.array_equal(arrays["scales"].reshape(2, -1)[1, :20], 3 * rows)
    facts, _ = for_kernels(StoredLinear(np.zeros((3, 8), np.uint16), np.ones((3, 8), bool)))
    assert (facts.kind, facts.layout) == (WeightKind.BF16, Layout.SPARSE_TILES)
    facts, _ = for_kernels(StoredLinear(codes, np.ones(codes.shape, bool), 2, scale), 4)
    assert (facts.kind, facts.layout) == (WeightKind.CODES4, Layout.SPARSE_INPUT_MAJOR_BLOCKS4)


def read_input_major(
    kind: str, cut: Geometry, arrays: dict[str, NDArray[Any]], inputs: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """As ``read_back``, of input-major weights."""
    sparse, bits = "starts" in arrays, {"codes2": 2, "codes4": 4, "codes8": 8}[kind]
    lines = cut.tiles * TILE // cut.line
    panels = -(-lines // (48 if kind == "codes2" else 96))
    per_panel = -(-lines // panels)
    found = np.zeros((cut.tiles * TILE, cut.padded), np.uint8)
    stored = np.ones(found.shape, bool)
    values, at = arrays["values"][:-SLACK], 0
    for panel in range(panels):
        count = min(per_panel, lines - panel * per_panel)
        for first in range(0, cut.padded, inputs):
            line_count = count * inputs
            if sparse:
                start = panel * (cut.padded // inputs + 1) + first // inputs
                at = int(arrays["offsets"][panel]) + int(arrays["starts"][start])
                masks = np.unpackbits(values[at : at + 16 * line_count], bitorder="little").reshape(line_count, 2, 64)
                at += 16 * line_count
            for line in range(line_count):
                kept = [0, 0]
                for half in range(cut.line // 64):
                    for byte in range(64):
                        column, output = first, byte % 16 // 4 * 16 + byte // 16 * 4 + byte % 4
                        if inputs == 4:
                            column, output = first + byte % 4, line % 4 * 16 + byte // 4
                        row = (panel * per_panel + line // inputs) * cut.line + half * 64 + output
                        if sparse:
                            stored[row, column] = masks[line, half, byte]
                            if not stored[row, column]:
                                continue
                            place = at + kept[half]
                            kept[half] += 1
                        else:
                            place = at + byte
                        found[row, column] = values[place] >> (half * bits) & ((1 << bits) - 1)
                at += max(kept) if sparse else 64
        if sparse:
            assert at == int(arrays["offsets"][panel + 1])
    assert at == len(values)
    room, width = cut.segment * cut.segments_per_scale, cut.columns // cut.scales
    columns = np.concatenate([np.arange(s * room, s * room + width) for s in range(cut.scales)])
    return found[: cut.rows][:, columns], stored[: cut.rows][:, columns]


@pytest.mark.parametrize(
    ("kind", "sparse"), [("codes2", False), ("codes4", False), ("codes8", False), ("codes4", True)]
)
@pytest.mark.parametrize(("shape", "scales"), [((1, 8), 1), ((130, 48), 3), ((300, 150), 1), ((12500, 10), 2)])
@pytest.mark.parametrize("inputs", [1, 4])
def test_input_major_weights_are_where_the_kernels_look(
    kind: str, sparse: bool, shape: tuple[int, int], scales: int, inputs: int
) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, {"codes2": 4, "codes4": 16, "codes8": 256}[kind], shape).astype(np.uint8)
    mask = generator.random(shape) < 0.3 if sparse else None
    cut = geometry(shape, scales, LINE_OUTPUTS[WeightKind(kind)])
    found, stored = read_input_major(kind, cut, arrange_input_major(WeightKind(kind), codes, mask, cut, inputs), inputs)
    assert np.array_equal(stored, np.ones(shape, bool) if mask is None else mask)
    assert np.array_equal(found[stored], codes[stored])
