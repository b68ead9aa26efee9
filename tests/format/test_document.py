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
    ("bits", "group_size", "symmetric", "sparse"),
    [
        *itertools.product([2, 3, 4, 5, 6, 7, 8], [None, 13], [True, False], [True, False]),
        (None, None, True, True),
        (None, None, True, False),
    ],
)
def test_printed_reader(bits: int | None, group_size: int | None, symmetric: bool, sparse: bool) -> None:
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
    )
    if bits is None:
        tensors = pack.pack_linear(spec, rng.standard_normal((5, 39)).astype(np.float32), mask)
    else:
        values, zero = (rng.integers(0, 2**bits, shape, dtype=np.uint8) for shape in [(5, 39), (5, spec.groups)])
        scale = pack.f32_to_bf16(rng.uniform(0.1, 1, (5, spec.groups)).astype(np.float32))
        tensors = pack.pack_linear(spec, values, mask, scale, None if symmetric else zero)
    expected = pack.unpack_linear(spec, tensors)
    if "scale" in tensors:
        tensors["scale"] = pack.bf16_to_f32(tensors["scale"])
    np.testing.assert_array_equal(printed_reader()["weight"](spec.to_json(), tensors), expected)
