"""What is kept where, against masks small enough to count by hand."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tulle.core.mask_structure import CORNER, GRID, mask_structure


def values(found: dict[str, Any], name: str) -> np.ndarray:
    """The bytes of a field in its shape."""
    rows, columns = found["grid"]
    shape = {"tiles": (rows, columns), "rows": (3, rows), "columns": (3, columns)}[name]
    return np.frombuffer(zlib.decompress(base64.b64decode(found[name])), np.uint8).reshape(shape)


def test_a_small_mask_counted_by_hand() -> None:
    mask = torch.tensor(
        [
            [1, 1, 1, 1, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 1, 1, 1],
        ],
        dtype=torch.bool,
    )
    found = mask_structure(mask)
    assert (found["tile"], found["grid"], found["stripe"]) == ([1, 4], [3, 2], 4)
    assert values(found, "tiles").tolist() == [[100, 25], [0, 0], [50, 75]]
    assert values(found, "rows").tolist() == [[62, 0, 62]] * 3  # 5 of 8 are kept: 62.5, to even
    assert values(found, "columns").tolist() == [[33, 0], [50, 33], [67, 67]]
    assert found["empty"] == found["nearly_empty"] == [1, 1]
    assert found["kept_in_stripe"] == pytest.approx([2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6], abs=1e-4)
    assert found["corner_shape"] == [3, 8]
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(found["corner"])), np.uint8))
    assert (bits.reshape(3, 8) == mask.numpy()).all()


def test_one_empty_row_and_column_are_seen_in_large_tiles() -> None:
    mask = torch.ones(1024, 2048, dtype=torch.bool)
    mask[100] = False
    mask[:, 64:66] = False
    mask[600, 204:] = False  # keeps 202 of 2048, just under a tenth of the average
    found = mask_structure(mask)
    assert found["tile"] == [32, 32]
    least, mean, most = values(found, "rows")
    assert least[3] == 0 and mean[3] == 97 and most[3] == 100
    assert values(found, "columns")[0][2] == 0
    assert found["empty"] == [1, 2] and found["nearly_empty"] == [2, 2]


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:8", 1, 8), ("8:16", 8, 16)])
def test_a_pattern_is_even_and_counted_in_its_own_stripes(pattern: str, n: int, m: int) -> None:
    scores = torch.rand(100, 12, m, generator=torch.Generator().manual_seed(1))
    mask = (scores.argsort(-1).argsort(-1) < n).reshape(100, -1)
    found = mask_structure(mask, pattern)
    assert found["stripe"] == m
    assert found["kept_in_stripe"] == [float(k == n) for k in range(m + 1)]
    assert set(values(found, "tiles").flat) == {round(100 * n / m)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 300), st.integers(0, 5))
def test_any_shape_gives_the_densities_of_its_tiles(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = mask_structure(mask)
    (height, width), (down, across) = found["tile"], found["grid"]
    assert down <= GRID[0] and across <= GRID[1] and width % 4 == 0
    assert (down - 1) * height < rows <= down * height and (across - 1) * width < columns <= across * width
    tiles = values(found, "tiles")
    for i in range(down):
        for j in range(across):
            tile = mask[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert abs(int(tiles[i, j]) - 100 * float(tile.float().mean())) < 0.51
    by_row = mask.float().mean(1)
    assert abs(int(values(found, "rows")[0].min()) - 100 * float(by_row.min())) < 0.51
    assert found["empty"][0] == int((by_row == 0).sum())
    assert found["corner_shape"] == [min(rows, CORNER[0]), min(columns, CORNER[1])]
    # Without a whole stripe there is nothing to count.
    assert sum(found["kept_in_stripe"]) == (pytest.approx(1, abs=1e-3) if columns >= 4 else 0)


def test_nothing_kept() -> None:
    found = mask_structure(torch.zeros(8, 8, dtype=torch.bool))
    assert found["empty"] == found["nearly_empty"] == [8, 8]
    assert not values(found, "tiles").any()


def test_a_linear_takes_little_room() -> None:
    scores = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).abs()
    scores *= torch.linspace(0.3, 3, 2048)  # densities that differ, which is what compresses badly
    assert len(json.dumps(mask_structure(scores > 1), indent=2)) < 2500
    pairs = torch.arange(2048).expand(2048, -1) % 4 < 2
    assert len(json.dumps(mask_structure(pairs, "2:4"), indent=2)) < 800


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a mask"):
        mask_structure(torch.ones(shape, dtype=torch.bool))
