"""Products with a held mask against NumPy in double precision, and the same bytes on every instruction set."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tulle import native
from tulle.native import SparsePattern

EPSILON = 2.0**-24


def problem(
    rows: int, columns: int, tokens: int, density: float, seed: int = 0
) -> tuple[NDArray[np.bool_], NDArray, NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < density
    weight, x, dy, bias = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((rows, columns), (tokens, columns), (tokens, rows), (rows,))
    )
    return mask, weight * mask, x, dy, bias


def assert_rounding_only(found: NDArray, a: NDArray, b: NDArray, extra: NDArray | float = 0.0) -> None:
    """found = a·b + extra in float32: a sum of n terms is wrong by at most n roundings of the sum of magnitudes."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    bound = (a.shape[1] + 2) * EPSILON * (np.abs(wide_a) @ np.abs(wide_b) + np.abs(extra))
    assert found.dtype == np.float32
    assert (np.abs(found - (wide_a @ wide_b + extra)) <= bound).all()


# Panels of 64 tokens in vectors of 16, blocks of 112 or 192 columns, parts of 1024 rows in groups of two.
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([111, 112, 113, 192, 193, 225, 385]))


@settings(deadline=None, max_examples=60)
@given(
    rows=SIZES,
    columns=SIZES,
    tokens=st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 200])),
    density=st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.7, 1.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products(rows: int, columns: int, tokens: int, density: float, threads: int, seed: int) -> None:
    mask, weight, x, dy, bias = problem(rows, columns, tokens, density, seed)
    pattern = SparsePattern(mask)
    np.testing.assert_array_equal(np.sort(pattern.entries), np.flatnonzero(mask))
    values = weight.reshape(-1)[pattern.entries]
    assert_rounding_only(pattern.product(values, x, bias, threads), x, weight.T, bias.astype(np.float64))
    assert_rounding_only(pattern.product(values, x, threads=threads), x, weight.T)
    assert_rounding_only(pattern.input_gradient(values, dy, threads), dy, weight)
    gradient = np.zeros(mask.size, np.float32)
    gradient[pattern.entries] = pattern.weight_gradient(x, dy, threads)
    assert_rounding_only(gradient[mask.reshape(-1)][None], *_pairs(dy, x, mask)) if mask.any() else None


def _pairs(dy: NDArray, x: NDArray, mask: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """The kept entries of dyᵀ·x as one row of products: ones [1, T] times dy·x by entry [T, kept], in double."""
    rows, columns = np.nonzero(mask)
    return np.ones((1, len(x))), dy[:, rows].astype(np.float64) * x[:, columns]


@pytest.mark.parametrize("shape", [(2049, 30), (30, 2049), (1025, 1025)])
def test_several_parts(shape: tuple[int, int]) -> None:
    mask, weight, x, dy, bias = problem(*shape, tokens=65, density=0.2)
    pattern = SparsePattern(mask)
    values = weight.reshape(-1)[pattern.entries]
    assert_rounding_only(pattern.product(values, x, bias, 2), x, weight.T, bias.astype(np.float64))
    assert_rounding_only(pattern.input_gradient(values, dy, 2), dy, weight)
    found = np.zeros(mask.size, np.float32)
    found[pattern.entries] = pattern.weight_gradient(x, dy, 2)
    assert_rounding_only(found[mask.reshape(-1)][None], *_pairs(dy, x, mask))


def test_one_kept_entry_by_hand() -> None:
    mask = np.array([[False, True], [False, False]])
    pattern = SparsePattern(mask)
    x, dy = np.array([[2, 3], [5, 7]], np.float32), np.array([[11, 13], [17, 19]], np.float32)
    values, bias = np.array([0.5], np.float32), np.array([1, 2], np.float32)
    assert pattern.entries.tolist() == [1] and pattern.kept == 1
    assert pattern.product(values, x, bias).tolist() == [[2.5, 2], [4.5, 2]]
    assert pattern.input_gradient(values, dy).tolist() == [[0, 5.5], [0, 8.5]]
    assert pattern.weight_gradient(x, dy).tolist() == [11 * 3 + 17 * 7]


def test_strided_inputs_are_copied() -> None:
    mask, weight, x, dy, _ = problem(20, 30, 17, 0.5)
    pattern = SparsePattern(np.asfortranarray(mask))
    values = weight.reshape(-1)[pattern.entries]
    twice = np.repeat(x, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(pattern.product(values, twice), pattern.product(values, x))
    np.testing.assert_array_equal(
        pattern.input_gradient(values, np.asfortranarray(dy)), pattern.input_gradient(values, dy)
    )


def test_pickle_keeps_the_order_of_the_values() -> None:
    mask = problem(50, 300, 1, 0.3)[0]
    pattern = SparsePattern(mask)
    again = pickle.loads(pickle.dumps(pattern))
    np.testing.assert_array_equal(again.entries, pattern.entries)
    assert again.shape == pattern.shape == (50, 300)


def test_the_same_bytes_on_every_instruction_set_and_for_any_threads() -> None:
    code = (
        "import sys, hashlib, numpy as np; from tulle import native; from tulle.native import SparsePattern\n"
        "r = np.random.default_rng(0); h = hashlib.sha256()\n"
        "for tokens in (1, 40, 150):\n"
        "    mask = r.random((300, 500)) < 0.3; p = SparsePattern(mask)\n"
        "    v, x, dy = (r.standard_normal(s, dtype=np.float32) for s in (p.kept, (tokens, 500), (tokens, 300)))\n"
        "    for t in (1, 2, 5):\n"
        "        one = [p.product(v, x, None, t), p.input_gradient(v, dy, t), p.weight_gradient(x, dy, t)]\n"
        "        digest = hashlib.sha256(b''.join(a.tobytes() for a in one)).hexdigest()\n"
        "        first = digest if t == 1 else first\n"
        "        assert digest == first\n"
        "    h.update(first.encode())\n"
        "print(native.isa, h.hexdigest())"
    )
    found = {}
    for isa in native.supported_isas():
        environment = os.environ | {"TULLE_ISA": isa}
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        ran, _, found[isa] = output.stdout.partition(" ")
        assert ran == isa
    assert len(set(found.values())) == 1


def test_shapes_and_dtypes_are_refused() -> None:
    mask, weight, x, dy, bias = problem(6, 10, 4, 0.5)
    pattern = SparsePattern(mask)
    values = weight.reshape(-1)[pattern.entries]
    with pytest.raises(ValueError, match=f"values: expected {pattern.kept}, found {pattern.kept - 1}"):
        pattern.product(values[:-1], x)
    with pytest.raises(ValueError, match="columns of x: expected 10, found 9"):
        pattern.product(values, x[:, :9])
    with pytest.raises(ValueError, match="entries of bias: expected 6, found 5"):
        pattern.product(values, x, bias[:5])
    with pytest.raises(ValueError, match="columns of dy: expected 6, found 5"):
        pattern.input_gradient(values, dy[:, :5])
    with pytest.raises(ValueError, match="rows of dy, as many as of x: expected 4, found 3"):
        pattern.weight_gradient(x, dy[:3])
    with pytest.raises(ValueError, match="threads: expected 1 to 1024, found 0"):
        pattern.product(values, x, threads=0)
    with pytest.raises(ValueError, match="expected 1 to 2\\^24 rows and columns, found 0"):
        SparsePattern(np.zeros((0, 3), np.bool_))
    with pytest.raises(TypeError):
        pattern.product(values.astype(np.float64), x)
    with pytest.raises(TypeError):
        SparsePattern(mask.astype(np.float32))
