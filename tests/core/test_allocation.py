"""The division of a budget against an exhaustive search, and its curves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tulle.core.allocation import allocate, lower_hull, monotone_curve
from tulle.errors import UserError

LEVELS = np.array([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("seed", range(20))
def test_no_division_on_the_grid_is_cheaper(seed: int) -> None:
    """Convex curves on one grid: the optimum of the continuous problem is among the grid's divisions."""
    g = np.random.default_rng(seed)
    costs = np.cumsum(np.cumsum(g.random((4, 4)), 1), 1)
    best: dict[float, float] = {}
    for choice in itertools.product(range(4), repeat=4):
        total = round(sum(LEVELS[list(choice)]), 9)
        cost = sum(c[k] for c, k in zip(costs, choice, strict=True))
        best[total] = min(best.get(total, np.inf), cost)
    for total, cost in best.items():
        found = allocate(np.tile(LEVELS, (4, 1)), costs, total)
        assert found.sum() == pytest.approx(total)
        assert sum(np.interp(s, LEVELS, c) for s, c in zip(found, costs, strict=True)) == pytest.approx(cost)


@pytest.mark.parametrize("seed", range(10))
def test_nothing_feasible_is_cheaper(seed: int) -> None:
    """Units of other sizes, curves of any shape: no other division costs less along the lower hulls."""
    g = np.random.default_rng(seed)
    sizes, costs = g.random(3) + 0.1, g.random((3, 4))
    gains = np.outer(sizes, LEVELS)
    budget = 0.5 * sizes.sum()
    hulls = [(x[h], c[h]) for x, c in zip(gains, costs, strict=True) for h in [lower_hull(x, c)]]
    found = allocate(gains, costs, budget)
    assert found.sum() == pytest.approx(budget)
    cost = sum(np.interp(s, *hull) for s, hull in zip(found, hulls, strict=True))
    fine = np.linspace(0.2, 0.8, 61)
    for a, b in itertools.product(fine * sizes[0], fine * sizes[1]):
        c = budget - a - b
        if 0.2 <= c / sizes[2] <= 0.8:
            assert cost <= sum(np.interp(s, *hull) for s, hull in zip((a, b, c), hulls, strict=True)) + 1e-9


def test_ends_and_budgets_out_of_reach() -> None:
    gains = np.outer([1.0, 3], LEVELS)
    costs = np.array([[0.0, 1, 2, 3], [0, 0, 0, 9]])
    assert allocate(gains, costs, 0.8) == pytest.approx([0.2, 0.6])
    assert allocate(gains, costs, 3.2) == pytest.approx([0.8, 2.4])
    # The second's first two pieces are free: 1.2 of the budget.
    assert allocate(gains, costs, 2.0) == pytest.approx([0.2, 1.8])
    with pytest.raises(UserError, match=r"budget from 0.8 to 3.2, found 3.6"):
        allocate(gains, costs, 3.6)


def test_of_equal_gains_the_first_counts() -> None:
    gains, costs = np.array([[0.0, 0, 1, 2]] * 2), np.array([[0.0, 5, 6, 8], [0.0, 5, 7, 8]])
    assert allocate(gains, costs, 2.0) == pytest.approx([2, 0])
    assert allocate(gains, costs, 0.0) == pytest.approx([0, 0])


def test_hull_by_hand() -> None:
    x = np.array([0.0, 1, 2, 3, 4])
    assert lower_hull(x, np.array([0.0, 5, 1, 1, 9])).tolist() == [0, 3, 4]
    assert lower_hull(x, np.array([0.0, 1, 4, 9, 16])).tolist() == [0, 1, 2, 3, 4]
    assert lower_hull(x, np.array([0.0, 1, 2, 3, 4])).tolist() == [0, 4]


def test_curve_stays_between_its_points() -> None:
    x, y = np.array([0.0, 0.3, 0.5, 0.9, 1.0]), np.array([0.0, 0.1, 0.1, 2.0, 7.0])
    found = monotone_curve(x, y, np.linspace(0, 1, 101))
    assert (np.diff(found) >= -1e-12).all()
    assert monotone_curve(x, y, x) == pytest.approx(y)
    assert monotone_curve(x, 3 * x - 1, np.linspace(0, 1, 11)) == pytest.approx(3 * np.linspace(0, 1, 11) - 1)
    assert monotone_curve(np.array([0.5]), np.array([2.0]), np.array([0.5])) == pytest.approx([2.0])
