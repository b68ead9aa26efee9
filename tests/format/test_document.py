"""The reader that docs/reference/format.md prints reads what pack.py writes."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tulle.format import pack
from tulle.format.spec import LinearSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "format.md"


def printed_reader() -> dict:
    source = DOCUMENT.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(source, names)
    return names


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "sparse", "scale_bits", "zero_point_bits"),
    [
        *itertools.product([2, 3, 4, 5, 6, 7, 8], [None, 13], [True, False], [True, False], [16, 8], [None]),
        *itertools.product([3, 4, 8], [13], [False], [True, False], [16, 8], [8]),
        (None, None, True, True, 16, None),
        (None, None, True, False, 16, None),
    ],
)
def test_printed_reader(
    bits: int | None,
    group_size: int | None,
    symmetric: bool,
    sparse: bool,
    scale_bits: int,
    zero_point_bits: int | None,
) -> None:
    rng = np.random.default_rng(11)
    mask = rng.random((5, 39)) < 0.4 if sparse else None
    spec = LinearSpec(
        (5, 39),
        bits,
        group_size,
        symmetric,
        sparse,
        int(mask.sum()) if mask is not None else None,
        values_dtype="float32" if bits is None else None,
        scale_bits=scale_bits,
        zero_point_bits=zero_point_bits,
    )
    if bits is None:
        tensors = pack.pack_linear(spec, rng.standard_normal((5, 39)).astype(np.float32), mask)
    else:
        values, zero = (rng.integers(0, 2**bits, shape, dtype=np.uint8) for shape in [(5, 39), (5, spec.groups)])
        scale = pack.f32_to_bf16(rng.uniform(0.1, 1, (5, spec.groups)).astype(np.float32))
        row_scale = None
        if scale_bits == 8:
            scale, row_scale = rng.integers(1, 256, scale.shape, dtype=np.uint8), scale[:, 0].copy()
        tensors = pack.pack_linear(spec, values, mask, scale, None if symmetric else zero, row_scale)
    agrees(spec, tensors)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("form", "size", "largest"), [("mxfp4", 32, 254), ("nvfp4", 16, 126)])
def test_printed_reader_of_floats(form: str, size: int, largest: int, sparse: bool) -> None:
    rng = np.random.default_rng(3)
    mask = rng.random((8, 64)) < 0.4 if sparse else None
    nonzeros = int(mask.sum()) if mask is not None else None
    spec = LinearSpec((8, 64), 4, size, True, sparse, nonzeros, scale_bits=8, format=form)
    values = rng.integers(0, 16, (8, 64), dtype=np.uint8)
    scale = rng.integers(2, largest - 2, (8, spec.groups), dtype=np.uint8)
    whole = np.array([0.125], np.float32) if form == "nvfp4" else None
    agrees(spec, pack.pack_linear(spec, values, mask, scale, tensor_scale=whole))


def agrees(spec: LinearSpec, tensors: dict) -> None:
    expected = pack.unpack_linear(spec, tensors)
    tensors |= {name: pack.bf16_to_f32(t) for name, t in tensors.items() if t.dtype == np.uint16}
    np.testing.assert_array_equal(printed_reader()["weight"](spec.to_json(), tensors), expected)
