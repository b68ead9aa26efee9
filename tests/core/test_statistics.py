"""Sums of outer products: both ways of computing them against float64, on every kind of edge."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from tulle import _native
from tulle.core import statistics
from tulle.core.statistics import accumulate_outer, takes_bfloat16

needs_kernel = pytest.mark.skipif(not _native.has_outer(), reason="this CPU has no products of bfloat16")

# (T, M, N): pairs of tokens that are not whole, tails beside 8, 16 and 48 channels, more than one packed block.
SHAPES = [
    (1, 1, 1),
    (2, 48, 48),
    (3, 50, 17),
    (31, 97, 64),
    (384, 8, 200),
    (385, 49, 47),
    (769, 100, 33),
    (1601, 60, 96),
]


def operands(
    tokens: int, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + rows + columns)
    a, b = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (rows, columns))
    return a, b, torch.randn(rows, columns, generator=generator)


def symmetric(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    x, _, total = operands(tokens, channels, channels)
    return x, total + total.T


def is_near(found: Tensor, total: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> bool:
    """Within float32 rounding of sums of T terms, of which at most 2·T roundings go one way."""
    exact = beta * total.double() + alpha * a.double().T @ b.double()
    magnitude = (beta * total.double()).abs() + abs(alpha) * a.double().abs().T @ b.double().abs()
    return bool(((found.double() - exact).abs() <= (2 * len(a) + 4) * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b, total = operands(*shape, dtype)
    for alpha, beta in ((1.0, 1.0), (-0.3, 0.7), (2.0, 0.0)):
        found = total.clone()
        accumulate_outer(found, a, b, alpha, beta)
        assert is_near(found, total, a, b, alpha, beta)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_with_itself(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PANEL", 32)
    x, total = symmetric(*shape[:2])
    for operand in (x, x.float()):
        found = total.clone()
        accumulate_outer(found, operand, operand, 0.3, 0.7)
        assert is_near(found, total, x, x, 0.3, 0.7)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_half_of_a_symmetric_sum_is_the_whole_to_the_bit(shape: tuple[int, int, int]) -> None:
    x, total = symmetric(*shape[:2])
    half, whole = total.clone(), total.clone()
    accumulate_outer(half, x, x, 0.3, 0.7)
    accumulate_outer(whole, x, x.clone(), 0.3, 0.7)
    assert torch.equal(half, whole) and torch.equal(half, half.T)
    # The lower triangle is written, never read.
    half = total.triu() + torch.full_like(total, torch.nan).tril(-1)
    accumulate_outer(half, x, x, 0.3, 0.7)
    assert torch.equal(half, whole)


def digest() -> str:
    """Of all results on the kernel, for 1, 2 and 5 threads; they must agree."""
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results = []
        for shape in SHAPES:
            a, b, total = operands(*shape)
            assert takes_bfloat16(total, a, b)
            accumulate_outer(total, a, b, 0.3, 0.7)
            x, own = symmetric(*shape[:2])
            accumulate_outer(own, x, x, 0.3, 0.7)
            results += [total, own]
        found.append(torch.cat([r.flatten() for r in results]))
    assert all(torch.equal(f, found[0]) for f in found)
    assert bool(found[0].isfinite().all())
    return hashlib.sha256(found[0].numpy().tobytes()).hexdigest()


@needs_kernel
def test_threads_do_not_change_a_bit_nor_what_memory_held_before() -> None:
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_statistics as t; print(t.digest())"
    )
    found = set()
    # glibc fills what it hands out with the complement of this byte, unless it is 0: bfloat16 of 3·10³⁸, and of −2·10³⁸.
    for poison in ("0", "128", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MALLOC_PERTURB_": poison},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout.strip())
    assert len(found) == 1


@needs_kernel
def test_infinities_and_nan_reach_the_sum_and_no_other() -> None:
    x, total = symmetric(5, 60)
    x[4, 59], x[3, 7] = torch.nan, torch.inf
    accumulate_outer(total, x, x)
    bad = torch.zeros(60, dtype=torch.bool)
    bad[[7, 59]] = True
    assert torch.equal(~total.isfinite(), bad | bad[:, None])


def test_strided_operands_and_no_tokens() -> None:
    a, b, total = operands(30, 40, 24)
    found = [total.clone() for _ in range(3)]
    accumulate_outer(found[0], a[::2], b[:, ::2].repeat_interleave(2, 1)[::2])
    accumulate_outer(found[1], a[::2].contiguous(), b[:, ::2].repeat_interleave(2, 1)[::2].contiguous())
    assert torch.equal(found[0], found[1])
    accumulate_outer(found[2], a[:0], b[:0], 2.0, 0.5)
    assert torch.equal(found[2], total * 0.5)


def test_the_kernel_is_for_bfloat16_on_the_cpu() -> None:
    a, b, total = operands(4, 6, 5)
    assert takes_bfloat16(total, a, b) == _native.has_outer()
    assert not takes_bfloat16(total, a, b.float()) and not takes_bfloat16(total, a.half(), b.half())
    assert not takes_bfloat16(total.double(), a, b) and not takes_bfloat16(total.T.contiguous().T, a, b)
    assert not takes_bfloat16(total.to("meta"), a.to("meta"), b.to("meta"))


def test_other_instruction_sets_take_torch() -> None:
    code = "from tulle import _native; print(_native.has_outer())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TULLE_ISA": "scalar"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False"


@needs_kernel
def test_bad_shapes_are_refused() -> None:
    x, total = np.zeros((4, 6), np.int16), np.zeros((6, 6), np.float32)
    calls = [
        lambda: _native.accumulate_outer(total, x[:, :5].copy(), None, 1, 1, 1),
        lambda: _native.accumulate_outer(total, x, x[:3].copy(), 1, 1, 1),
        lambda: _native.accumulate_outer(total, x, x[:, :5].copy(), 1, 1, 1),
        lambda: _native.accumulate_outer(total, x, None, 1, 1, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected"):
            call()
