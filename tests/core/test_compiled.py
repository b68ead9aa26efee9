"""The compiled search for codes against the plain torch that defines it.

Both compute in float32, in another order. Where two choices are equally good to seven digits, either may win, and the
rest of that row then goes another way, equally good. So codes are compared by how many agree, and the objective row by
row: E is a sum of C products of rounded numbers, wrong by some 1e-5 of its value.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from oracles.problems import layer, statistics
from tulle.core import compiled
from tulle.core.descent import descend, descend_plain, objective
from tulle.core.grid import Grid, Quantised, code, find_steps
from tulle.core.hessian import Hessian
from tulle.core.masks import Pattern
from tulle.methods.prune.sparsegpt import sparsegpt
from tulle.methods.quantize.gptq import gptq

ROUNDING = 1e-4
AGREE = 0.999

# Rows and columns that are no multiple of a vector, a tile or a block; groups narrower and wider than both.
SHAPES = [
    (3, 24, 8),
    (70, 72, 12),
    (64, 128, 64),
    (17, 200, 40),
    (130, 192, 32),
    (5, 150, 150),
    (33, 320, 160),
    (20, 96, 1),
    (1, 7, 7),
]


def problem(rows: int, columns: int, seed: int = 0, dead: bool = False) -> tuple[Tensor, Hessian]:
    w, x = layer(rows, columns, seed=seed)
    if dead:
        x[:, ::5] = 0
    hessian = statistics(x).hessian
    assert hessian is not None
    return w, hessian


def mask_of(w: Tensor, masked: bool) -> Tensor | None:
    """Half of the entries, one row empty and one full."""
    if not masked:
        return None
    mask = w.abs() > 0.6
    mask[0], mask[-1] = False, True
    return mask


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "fits", lambda *_, **__: False)


def agreement(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    same = a == b
    return float((same if mask is None else same[mask]).float().mean()) if mask is None or bool(mask.any()) else 1.0


def assert_as_good(w: Tensor, found: Tensor, plain: Tensor, hessian: Tensor) -> None:
    a, b = (objective(w, t, hessian) for t in (found, plain))
    torch.testing.assert_close(a.sum(), b.sum(), rtol=1e-3, atol=1e-6)
    exact = (found == plain).all(1)
    torch.testing.assert_close(a[exact], b[exact], rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("rows,columns,group_size", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_clip_search_takes_steps_as_good(
    rows: int, columns: int, group_size: int, symmetric: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, hessian = problem(rows, columns)
    grid, mask, importance = Grid(4, group_size, symmetric), mask_of(w, masked), hessian.matrix.diagonal()
    found = find_steps(w, grid, importance, 20, mask)
    plainly(monkeypatch)
    plain = find_steps(w, grid, importance, 20, mask)
    same = (found[0] == plain[0]) & (found[1] == plain[1])
    assert float(same.float().mean()) > 0.98
    kept = torch.ones_like(w) if mask is None else mask.float()

    def error(step: Tensor, zero: Tensor) -> Tensor:
        step, zero = (t.repeat_interleave(group_size, 1) for t in (step, zero))
        rounded = (code(w * kept, step, zero, grid) - zero) * step
        return (importance * (w * kept - rounded).square()).reshape(rows, -1, group_size).sum(-1)

    # Of two ratios with equal errors either may be taken.
    torch.testing.assert_close(error(*found), error(*plain), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_in_given_ranges(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = problem(19, 48)
    ranges = (torch.full((19, 3), -0.7), torch.linspace(0.2, 3, 57).reshape(19, 3))
    found = find_steps(w, Grid(3, 16, symmetric), None, 7, None, ranges=ranges)
    plainly(monkeypatch)
    plain = find_steps(w, Grid(3, 16, symmetric), None, 7, None, ranges=ranges)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("rows,columns,group_size", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_sweep_rounds_as_the_plain_one(
    rows: int, columns: int, group_size: int, symmetric: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, hessian = problem(rows, columns, dead=True)
    mask, grid, factor = mask_of(w, masked), Grid(4, group_size, symmetric), hessian.factor(0.01, True)
    scale, zero = find_steps(w, grid)
    found = [gptq(w, factor, grid, scale, zero, mask, block) for block in (32, 100, 1000)]
    plainly(monkeypatch)
    plain = gptq(w, factor, grid, scale, zero, mask)
    for one in found:
        assert agreement(one.codes, plain.codes, mask) >= AGREE
        assert int(one.codes.min()) >= grid.low and int(one.codes.max()) <= grid.high
        assert_as_good(w, one.dequantise(mask), plain.dequantise(mask), hessian.damped(0.01))


@pytest.mark.parametrize("rows,columns", [(70, 72), (6, 24), (130, 200)])
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(3, 8), Pattern(1, 2)])
@pytest.mark.parametrize("grid", [None, Grid(4, 8), Grid(3, None, False)])
@pytest.mark.parametrize("masked", [True, False])
def test_sparsegpt_prunes_as_the_plain_one(
    rows: int, columns: int, pattern: Pattern | None, grid: Grid | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, hessian = problem(rows, columns, dead=True)
    allowed = None if not masked else torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    factor = hessian.factor(0.01)
    sparsity = 0.6 if pattern is None else None

    def run() -> tuple[Tensor, Tensor, Quantised | None]:
        quantised = None
        if grid is not None:
            quantised = Quantised(grid, torch.full(w.shape, -99, dtype=torch.int16), *find_steps(w, grid))
        compressed, mask = sparsegpt(
            w, factor, sparsity=sparsity, pattern=pattern, allowed=allowed, dead=hessian.dead, quantised=quantised,
            block=48,
        )  # fmt: skip
        return compressed, mask, quantised

    found, mask, quantised = run()
    plainly(monkeypatch)
    plain, plain_mask, plain_quantised = run()
    # A row in which one decision fell the other way differs from there on; others agree to rounding.
    same = (mask == plain_mask).all(1)
    if quantised is not None and plain_quantised is not None:
        same &= ((quantised.codes == plain_quantised.codes) | ~mask).all(1)
    assert float(same.float().mean()) > 0.95
    torch.testing.assert_close(found[same], plain[same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        objective(w, found, hessian.damped(0.01)).sum(), objective(w, plain, hessian.damped(0.01)).sum(),
        rtol=1e-3, atol=1e-6,
    )  # fmt: skip
    assert bool((found[~mask] == 0).all()) and (allowed is None or not bool((mask & ~allowed).any()))
    if sparsity is not None:
        assert int(mask.sum()) == int(plain_mask.sum())


def started(w: Tensor, grid: Grid) -> Quantised:
    scale, zero = find_steps(w, grid)
    width = w.shape[1] // scale.shape[1]
    codes = code(w, scale.repeat_interleave(width, 1), zero.repeat_interleave(width, 1), grid)
    return Quantised(grid, codes.to(torch.int16), scale, zero)


@pytest.mark.parametrize("rows,columns,group_size", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_descent_goes_where_the_plain_one_goes(
    rows: int, columns: int, group_size: int, symmetric: bool, masked: bool
) -> None:
    w, hessian = problem(rows, columns, dead=True)
    mask, begin, h = mask_of(w, masked), started(w, Grid(3, group_size, symmetric)), hessian.damped(0.01)
    found, plain = descend(w, begin, h, mask, 4), descend_plain(w, begin, h, mask, 4, 128)
    assert agreement(found.codes, plain.codes, mask) >= 0.998 and agreement(found.scale, plain.scale, None) >= 0.998
    assert_as_good(w, found.dequantise(mask), plain.dequantise(mask), h)
    if mask is not None:
        assert torch.equal(found.codes[~mask], begin.codes[~mask])


@given(seed=st.integers(0, 999), symmetric=st.booleans(), masked=st.booleans(), bits=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_descent_on_tiny_layers(seed: int, symmetric: bool, masked: bool, bits: int) -> None:
    w, x = layer(5, 12, seed=seed)
    h, mask = x.T @ x / len(x), w.abs() > 0.5 if masked else None
    begin = started(w, Grid(bits, 4, symmetric))
    found, plain = descend(w, begin, h, mask, 5), descend_plain(w, begin, h, mask, 5, 128)
    a, b, start = (objective(w, q.dequantise(mask), h) for q in (found, plain, begin))
    assert bool((a <= start * (1 + 1e-5)).all())
    # A tie can only be taken differently by rows whose codes or steps then differ.
    equal = (found.dequantise(mask) == plain.dequantise(mask)).all(1)
    assert int(equal.sum()) >= 4
    torch.testing.assert_close(a[equal], b[equal])


def test_a_step_that_shrinks_to_nothing_stays_positive() -> None:
    # The masked weight's error draws the step of its group to zero; a step of 0 would divide by it.
    w, x = layer(4, 16, seed=1)
    h, mask = x.T @ x / len(x), w.abs() > 0.5
    begin = started(w, Grid(2, 2, False))
    for end in (descend(w, begin, h, mask, 1), descend_plain(w, begin, h, mask, 1, 128)):
        assert bool((end.scale > 0).all()) and float(end.scale.min()) < 1e-20
        assert torch.equal(end.scale, end.scale.bfloat16().float())
        assert bool((objective(w, end.dequantise(mask), h) <= objective(w, begin.dequantise(mask), h)).all())


def test_rows_are_cut_into_chunks_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(23, 48)
    begin = started(w, Grid(3, 16))
    whole = descend(w, begin, hessian.damped(0.01))
    monkeypatch.setattr(compiled, "PRODUCTS", 48 * 3 * 5)
    cut = descend(w, begin, hessian.damped(0.01))
    assert agreement(whole.codes, cut.codes, None) >= AGREE
    assert_as_good(w, cut.dequantise(), whole.dequantise(), hessian.damped(0.01))


def test_tensors_elsewhere_take_the_plain_way() -> None:
    assert compiled.fits(torch.ones(2), None, torch.ones(2, dtype=torch.bool))
    assert not compiled.fits(torch.ones(2, dtype=torch.float64))
    assert not compiled.fits(torch.ones(2, device="meta"))
