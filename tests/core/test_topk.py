"""Selections of inputs: counts, ties, blocks and units against brute force, gradients by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tulle import native
from tulle.core.masks import largest
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection, keep_largest, top_k
from tulle.errors import UserError


def naive_top_k(scores: np.ndarray, keep: int) -> np.ndarray:
    """Mask of one row, by a stable sort of (−score, index)."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    mask = np.zeros(len(scores), bool)
    mask[order[:keep]] = True
    return mask


def drawn(seed: int, *shape: int, levels: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(-levels, levels + 1, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 24), st.integers(1, 24), st.sampled_from([None, 1, 3]))
def test_counts_are_exact_and_ties_go_to_the_lower_index(seed, n, keep, levels):
    keep = min(keep, n)
    x = drawn(seed, 5, n, levels=levels)
    found = Selection(keep=keep).mask(x)
    expected = np.stack([naive_top_k(row, keep) for row in x.abs().numpy()])
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_way_to_the_threshold_gives_one_mask(dtype):
    scores = drawn(0, 7, 50).abs().to(dtype)
    assert torch.equal(keep_largest(scores, 13), largest(scores.float(), 13))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**16),
    st.sampled_from([(2, 4), (16, 32), (1, 3), (5, 8)]),
    st.integers(1, 4),
    st.sampled_from([None, 2]),
)
def test_blocks(seed, nm, blocks, levels):
    n, m = nm
    x = drawn(seed, 3, m * blocks, levels=levels)
    mask = Selection(keep=n, block=m).mask(x)
    assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
    for row, kept in zip(x.abs().numpy(), mask.numpy(), strict=True):
        expected = np.concatenate([naive_top_k(part, n) for part in row.reshape(-1, m)])
        assert np.array_equal(kept, expected)


@pytest.mark.parametrize("by", ["max", "norm"])
@pytest.mark.parametrize("block", [None, 16])
def test_aligned_units(by, block):
    x = drawn(3, 6, 32)
    mask = Selection(keep=8, block=block, unit=4, by=by).mask(x)
    units = x.abs().reshape(6, 8, 4).numpy()
    score = units.max(-1) if by == "max" else np.sqrt((units**2).sum(-1))
    width = 4 if block else 8
    for row, kept in zip(score, mask.numpy(), strict=True):
        expected = np.concatenate([naive_top_k(part, 2) for part in row.reshape(-1, width)])
        assert np.array_equal(kept, np.repeat(expected, 4))
    assert not torch.equal(mask, Selection(keep=8, block=block, unit=4, by="norm" if by == "max" else "max").mask(x))


def test_kept_is_the_best_choice():
    """Of all masks with K entries, Top-K leaves the least |x − x⊙M|² (enumerated)."""
    x = drawn(1, 1, 8)
    lost = {
        kept: float(x[0, [j for j in range(8) if j not in kept]].square().sum())
        for kept in itertools.combinations(range(8), 3)
    }
    best = min(lost, key=lost.__getitem__)
    assert torch.equal(Selection(keep=3).mask(x).nonzero()[:, 1], torch.tensor(best))


def test_weighted_scores():
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    assert Selection(keep=2, score=torch.tensor([9.0, 1.0, 1.0, 20.0])).mask(x).tolist() == [[True, False, False, True]]


def test_threshold_and_relu():
    x = torch.tensor([[1.0, -2.0, 0.5, -0.5, 0.0]])
    assert Selection("threshold", threshold=0.5).mask(x).tolist() == [[True, True, False, False, False]]
    assert torch.equal(Selection("relu").apply(x), x.relu())


def test_selection_of_codes_prefers_the_lower_index():
    # 0.9 and 1.1 are one code of a 2-bit grid of step 3; the larger number lies behind.
    x = torch.tensor([[3.0, 1.6, 1.7, 0.1]])
    rounded = TokenGrid(2).fake(x)
    assert Selection(keep=2).mask(rounded).tolist() == [[True, True, False, False]]
    assert Selection(keep=2).mask(x).tolist() == [[True, False, True, False]]


def test_gradients_by_hand():
    x = torch.tensor([[3.0, -1.0, 2.0, 0.5]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for straight, expected in ((True, [[1.0, 2.0, 3.0, 4.0]]), (False, [[1.0, 0.0, 3.0, 0.0]])):
        y = Selection(keep=2).apply(x, straight)
        assert y.tolist() == [[3.0, 0.0, 2.0, 0.0]]
        (gradient,) = torch.autograd.grad(y, x, upstream)
        assert gradient.tolist() == expected
    # ‖x‖² = 14.25 and ‖x⊙M‖² = 13.
    ratio = (14.25 / 13) ** 0.5
    y = Selection(keep=2, rescale=True).apply(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.allclose(y, ratio * torch.tensor([[3.0, 0.0, 2.0, 0.0]]))
    assert torch.allclose(gradient, ratio * upstream)


def test_without_straight_through_it_is_the_true_derivative():
    x = drawn(5, 3, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: Selection(keep=5).apply(t, straight_through=False), x)


def test_rescale_keeps_the_length_and_zeros_stay():
    x = drawn(2, 4, 20)
    x[1] = 0
    y = Selection(keep=6, rescale=True).apply(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1)) and not y[1].any()
    assert torch.equal(Selection(keep=20, rescale=True).apply(x), x)


def test_compiled_model_gives_the_same_numbers():
    x = drawn(4, 8, 24)

    def double(t: torch.Tensor) -> torch.Tensor:
        return Selection(keep=7).apply(t) * 2

    assert torch.equal(torch.compile(double, backend="eager", fullgraph=True)(x), double(x))


@pytest.mark.parametrize(
    ("share", "channels", "block", "unit", "keep"),
    [(0.7, 256, None, 1, 77), (0.5, 64, 32, 1, 16), (0.6, 40, None, 4, 16), (0.99, 8, None, 1, 1), (0.0, 8, 4, 1, 4)],
)
def test_shares(share, channels, block, unit, keep):
    assert top_k(share, channels, block, unit).keep == keep


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: top_k(1.0, 8), "share of zeroed inputs in"),
        (lambda: top_k(0.5, 40, block=32), "divides 40 input channels"),
        (lambda: top_k(0.5, 30, unit=4), "unit that divides the block"),
        (lambda: Selection(keep=3, unit=2), "multiple of unit 2"),
        (lambda: Selection(keep=8, block=4), "at least keep 8"),
        (lambda: Selection("threshold"), "expected a threshold"),
        (lambda: Selection("relu", keep=3), "only with top_k"),
    ],
)
def test_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_misfits():
    assert "divisible" in str(Selection(keep=16, block=32).fits(40))
    assert "at most 8" in str(Selection(keep=9).fits(8))
    assert "one score" in str(Selection(keep=2, score=torch.ones(3)).fits(4))
    assert Selection("threshold", threshold=0.0).fits(7) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_native_mask_is_the_plain_one(threads):
    for n, keep, levels in [(1, 1, None), (32, 16, None), (64, 45, 2), (768, 230, 127), (5632, 1690, None)]:
        scores = drawn(n, 33, n, levels=levels).abs()
        scores[0] = 0
        found = native.keep_largest(scores.numpy(), keep, threads)
        assert np.array_equal(found, largest(scores, keep).numpy())
    with pytest.raises(ValueError, match="at least 1 kept"):
        native.keep_largest(np.ones((2, 4), np.float32), 0)
