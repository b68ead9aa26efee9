"""Searches against exhaustive search, gains against recomputed sums, and the published efficacies."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from tulle.core.masks import Pattern, keep_pattern
from tulle.core.permutation import Swaps, efficacy, greedy_swaps, ideal, retained, search, stripe_groups
from tulle.errors import UserError

SEARCHES = {
    "greedy": greedy_swaps,
    "escapes": lambda s, p: greedy_swaps(s, p, escapes=20),
    "groups": stripe_groups,
    "annealed": search,
}


def uniform(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def published() -> Tensor:
    """The matrix of the paper's comparison: 128 rows, 64 columns, uniform, seed 1."""
    return torch.from_numpy(np.random.RandomState(1).rand(128, 64).astype(np.float32))


def best_of_all(scores: Tensor, pattern: Pattern) -> float:
    """The most that any order retains: all partitions of the columns into stripes."""
    m, columns = pattern.m, scores.shape[1]
    seen = {}
    for order in permutations(range(columns)):
        stripes = tuple(sorted(tuple(sorted(order[i : i + m])) for i in range(0, columns, m)))
        if stripes not in seen:
            seen[stripes] = retained(scores[:, [c for s in stripes for c in s]], pattern)
    return max(seen.values())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "2:2"])
def test_against_all_orders(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    scores = uniform(6, 8, seed=3)
    most = best_of_all(scores, parsed)
    for name in ("groups", "annealed"):
        found = retained(scores[:, SEARCHES[name](scores, parsed)], parsed)
        if parsed.m == 4 or name == "annealed":  # two stripes of 4 are one group; four of 2 are not
            assert found == pytest.approx(most, rel=1e-6), name
        assert found <= most + 1e-9


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_an_order_that_never_loses(name: str, pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    for seed in range(3):
        # Columns of very different size, ties, and a column of zeros.
        scores = uniform(20, 32, seed) * (10 ** (3 * uniform(1, 32, seed + 9) - 2))
        scores[:, 5] = 0
        scores[:, 6] = scores[:, 7]
        index = SEARCHES[name](scores, parsed)
        assert sorted(index.tolist()) == list(range(32))
        assert retained(scores[:, index], parsed) >= retained(scores, parsed)
        assert torch.equal(index, SEARCHES[name](scores, parsed))


def test_retained_is_what_the_mask_keeps() -> None:
    scores, pattern = uniform(50, 48), Pattern(4, 8)
    kept = float((scores * keep_pattern(scores, pattern)).double().sum())
    assert retained(scores, pattern) == pytest.approx(kept, rel=1e-6)
    assert ideal(scores, pattern) == pytest.approx(float(scores.sort(1).values[:, 24:].double().sum()), rel=1e-6)
    assert efficacy(scores, pattern, torch.arange(48)).value == 0


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "5:8", "8:8", "1:2"])
def test_gains_are_what_a_swap_changes(pattern: str) -> None:
    parsed, scores = Pattern.parse(pattern), uniform(9, 16)
    scores[:, 3] = scores[:, 11]  # ties
    state = Swaps(scores, parsed)
    state.swap(torch.tensor([[0, 9]]))
    gains, before = state.gains(), retained(scores[:, state.index], parsed)
    for p in range(16):
        for q in range(16):
            index = state.index.clone()
            index[[p, q]] = index[[q, p]]
            change = retained(scores[:, index], parsed) - before
            assert float(gains[p, q]) == pytest.approx(change, abs=1e-5), (p, q)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    # The paper: swaps 32.1 %; 1000 escapes 36.0 % (ours remembers the best, 100 already pass it); groups of two 35.5 %.
    [("greedy", 31.95, 32.25), ("groups", 35.3, 35.7), ("annealed", 38.0, 41.0)],
)
def test_published_matrix(name: str, low: float, high: float) -> None:
    scores = published()
    assert low <= 100 * efficacy(scores, Pattern(2, 4), SEARCHES[name](scores, Pattern(2, 4))).value <= high


def test_escapes_go_on_from_the_best() -> None:
    scores, pattern = published(), Pattern(2, 4)
    plain, escaped = (efficacy(scores, pattern, greedy_swaps(scores, pattern, escapes)).value for escapes in (0, 100))
    assert escaped > plain + 0.03


def test_the_search_finds_a_hidden_order() -> None:
    """Two large columns per stripe fit 2:4 without loss; the columns come shuffled, ten stripes' worth of large ones
    in front."""
    scores = uniform(100, 64) * 0.1
    scores[:, :32] += 1
    index = search(scores, Pattern(2, 4))
    assert (index.reshape(-1, 4) < 32).sum(1).tolist() == [2] * 16


def test_threads_and_seeds() -> None:
    scores, pattern = uniform(600, 384), Pattern(2, 4)
    one = search(scores, pattern, seed=1, effort=0.01, threads=1)
    assert torch.equal(one, search(scores, pattern, seed=1, effort=0.01, threads=3))
    assert not torch.equal(one, search(scores, pattern, seed=2, effort=0.01, threads=1))


def test_nothing_to_search() -> None:
    for scores in (torch.zeros(4, 16), uniform(4, 4), uniform(1, 16)[:, :0].reshape(1, 0)):
        assert search(scores, Pattern(2, 4)).tolist() == list(range(scores.shape[1]))
    with pytest.raises(UserError, match="divisible by 4"):
        search(uniform(4, 10), Pattern(2, 4))
    with pytest.raises(UserError, match="the annealed search"):
        stripe_groups(uniform(4, 64), Pattern(8, 16), 3)
