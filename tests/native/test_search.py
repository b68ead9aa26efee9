"""The search for codes: the same bytes for any number of threads and on every instruction set, refused bad shapes."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from tulle import _native, native


def data(rows: int, columns: int, groups: int, seed: int = 0) -> dict[str, NDArray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * columns, columns), dtype=np.float32)
    hessian = x.T @ x / np.float32(len(x)) + np.eye(columns, dtype=np.float32)
    lower = np.linalg.cholesky(hessian)
    return {
        "weight": rng.standard_normal((rows, columns), dtype=np.float32),
        "hessian": hessian,
        "feedback": np.ascontiguousarray(lower / lower.diagonal()[:, None]),
        "mask": rng.random((rows, columns)) < 0.6,
        "step": (0.3 + rng.random((rows, groups), dtype=np.float32)).astype(np.float16).astype(np.float32),
        "zero": rng.integers(0, 15, (rows, groups)).astype(np.float32),
        "codes": rng.integers(0, 16, (rows, columns)).astype(np.int16),
    }


def search(rows: int, columns: int, groups: int, threads: int) -> list[NDArray]:
    """Everything that the kernels write, from poisoned outputs."""
    found = []
    d = data(rows, columns, groups)
    importance = np.abs(d["weight"][0]) + np.float32(0.1)
    ratios = (1 - np.arange(7) / 14).astype(np.float32)
    for symmetric in (True, False):
        low, high = (-8, 7) if symmetric else (0, 15)
        step, zero = (np.full((rows, groups), np.nan, np.float32) for _ in range(2))
        _native.find_steps(
            d["weight"], importance, d["mask"], low, high, symmetric, ratios, None, None, step, zero, threads
        )
        found += [step, zero]

    turned, mask = np.ascontiguousarray(d["weight"].T), np.ascontiguousarray(d["mask"].T)
    grid = (np.arange(columns) * groups // columns, *(np.ascontiguousarray(d[key].T) for key in ("step", "zero")))
    stripe = next(m for m in (4, 3, 5, 7, 1) if columns % m == 0)
    for with_grid in (True, False):
        for n, m in ((0, 0), (max(1, stripe // 2), stripe)):
            for weight in (turned, None):
                value, kept = turned.copy(), mask.copy()
                error, codes = np.full_like(turned, np.nan), np.full(turned.shape, -999, np.int16)
                _native.sweep_block(
                    0, d["feedback"], weight, value, error, *(grid if with_grid else (None, None, None)), 0, 15,
                    codes if with_grid else None, kept, n, m, importance, threads,
                )  # fmt: skip
                assert np.isfinite(error).all()
                found += [value, error, kept, codes]

    for steps_first in (True, False):
        level, residual = (np.full_like(d["weight"], np.nan) for _ in range(2))
        codes, step = d["codes"].copy(), d["step"].copy()
        _native.open_levels(codes, step, d["zero"], d["mask"], d["weight"], level, residual, threads)
        found += [level, residual]
        # Sums of numpy's own, so that they are the same here and there: products are BLAS's.
        gradient = np.einsum("rc,cd->rd", residual, d["hessian"])
        by_group = level.reshape(rows, groups, -1), d["hessian"].reshape(groups, -1, columns)
        product = np.ascontiguousarray(np.einsum("rgc,gcd->grd", *by_group))
        _native.descend(
            d["hessian"], gradient, product, codes, step, d["zero"], d["mask"], 0, 15, 3, steps_first, threads
        )
        assert not np.array_equal(codes, d["codes"])
        assert np.array_equal(codes[~d["mask"]], d["codes"][~d["mask"]])
        found += [gradient, product, codes, step]
    return found


# Tails of every kind: rows beside 16 and 64, columns beside 16, groups of 1 to 150.
CASES = [(1, 7, 1), (70, 72, 6), (64, 64, 1), (17, 200, 5), (130, 96, 96), (5, 150, 1), (16, 48, 3)]


def digest(threads: int) -> str:
    total = hashlib.sha256()
    for case in CASES:
        for array in search(*case, threads):
            # + 0: the sign of a zero does not matter.
            total.update(np.ascontiguousarray(array + array.dtype.type(0)).tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def expected() -> str:
    return digest(1)


def test_threads_do_not_change_a_byte(expected: str) -> None:
    assert digest(2) == expected and digest(5) == expected


@pytest.mark.parametrize("isa", native.supported_isas())
def test_instruction_sets_agree_byte_by_byte(isa: str, expected: str) -> None:
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_search as t; print(t.digest(2))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TULLE_ISA": isa}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == expected


def test_columns_are_taken_and_put_back() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(37)
    for array in (rng.standard_normal((21, 37), dtype=np.float32), rng.random((21, 37)) < 0.5):
        turned, back = np.empty((37, 21), array.dtype), np.empty_like(array)
        _native.take_columns(array, order, turned, 2)
        assert np.array_equal(turned, array[:, order].T)
        _native.put_columns(turned, order, back, 2)
        assert np.array_equal(back, array)


def test_bad_shapes_are_refused() -> None:
    d = data(4, 12, 3)
    w, h = d["weight"], d["hessian"]
    turned, out = np.ascontiguousarray(w.T), np.empty((12, 4), np.float32)
    steps = np.empty((4, 3), np.float32), np.empty((4, 3), np.float32)
    ones, gradient, product = np.ones(12, np.float32), np.empty_like(w), np.empty((3, 4, 12), np.float32)
    block = (turned.copy(), out)
    none = (None, None, None, 0, 15, None)
    calls = [
        lambda: _native.find_steps(w, ones[:5], None, -8, 7, True, ones, None, None, *steps, 1),
        lambda: _native.find_steps(w, ones, d["mask"][:2], -8, 7, True, ones, None, None, *steps, 1),
        lambda: _native.find_steps(w, ones, None, -8, 7, True, ones[:0], None, None, *steps, 1),
        lambda: _native.find_steps(w, ones, None, -8, 7, True, ones, steps[0], None, *steps, 1),
        lambda: _native.find_steps(w, ones, None, 3, 7, True, ones, None, None, *steps, 1),
        lambda: _native.find_steps(w, ones, None, -8, 7, True, ones, None, None, *steps, 0),
        lambda: _native.sweep_block(1, h, turned, *block, *none, None, 0, 0, None, 1),
        lambda: _native.sweep_block(13, h, turned, *block, *none, None, 0, 0, None, 1),
        lambda: _native.sweep_block(0, h[:11], turned, *block, *none, None, 0, 0, None, 1),
        lambda: _native.sweep_block(0, h, turned, *block, *none, None, 2, 4, ones, 1),
        lambda: _native.sweep_block(0, h, turned, *block, *none, turned > 0, 2, 5, ones, 1),
        lambda: _native.sweep_block(
            0, h, turned, *block, np.full(12, 3), *(np.ones((3, 4), np.float32),) * 2, 0, 15,
            np.empty((12, 4), np.int16), None, 0, 0, None, 1,
        ),
        lambda: _native.take_columns(w, np.zeros(12, np.int64), out, 1),
        lambda: _native.take_columns(w, np.arange(11), out, 1),
        lambda: _native.descend(h, gradient, product[:2], d["codes"], *steps, None, 0, 15, 1, False, 1),
        lambda: _native.descend(h[:3], gradient, product, d["codes"], *steps, None, 0, 15, 1, False, 1),
        lambda: _native.descend(h, gradient, product, d["codes"], *steps, d["mask"][:, :4].copy(), 0, 15, 1, False, 1),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="expected"):
            call()
