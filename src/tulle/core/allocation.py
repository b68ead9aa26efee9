"""Dividing a budget among units with measured cost curves.

Minimise Σ_u c_u(g_u) with Σ_u g_u = B, where g_u is what a unit gives to the budget (its pruned weights, the bytes it
saves) and c_u(g_u) what that costs. At the optimum all units that are free to move have one slope c_u′(g_u), the
Lagrange multiplier. Where the curves are convex and piecewise linear, taking their pieces by rising slope, the last one
in part, is exact; a curve that is not convex is replaced by its lower hull.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError

Array = NDArray[np.float64]


def lower_hull(x: Array, y: Array) -> Array:
    """Indices of the vertices of the lower convex hull of points with rising ``x`` ``[K]``; first and last included."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            # b lies on or above the line from a to i.
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull)


def monotone_curve(x: Array, y: Array, points: Array) -> Array:
    """The curve through rising ``x`` ``[K]``, ``y`` ``[K]`` at ``points`` between them, without overshoot.

    Cubic Hermite pieces with the slopes of Fritsch & Butland 1984: the harmonic mean of the neighbours' slopes where
    those have one sign, else 0; at an end, that of the piece.
    """
    if len(x) < 2:
        return np.full_like(points, y[0])
    h = np.diff(x)
    slope = np.diff(y) / h
    m = np.concatenate([slope[:1], np.zeros(len(x) - 2), slope[-1:]])
    same = slope[:-1] * slope[1:] > 0
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    inner = np.zeros(len(x) - 2)
    inner[same] = (w1 + w2)[same] / (w1[same] / slope[:-1][same] + w2[same] / slope[1:][same])
    m[1:-1] = inner
    i = np.clip(np.searchsorted(x, points, "right") - 1, 0, len(h) - 1)
    t = (points - x[i]) / h[i]
    value = (1 + 2 * t) * (1 - t) ** 2 * y[i] + t * (1 - t) ** 2 * h[i] * m[i]
    return value + t**2 * (3 - 2 * t) * y[i + 1] - t**2 * (1 - t) * h[i] * m[i + 1]


def allocate(gains: Array, costs: Array, budget: float) -> Array:
    """g ``[U]`` for curves ``costs`` ``[U, K]`` at ``gains`` ``[U, K]``, which never fall along a row, and B.

    Σ g is B up to rounding. Of points with one gain the first counts. Raises ``UserError`` when B lies outside what the
    first and last points allow.
    """
    first, last = gains[:, 0].sum(), gains[:, -1].sum()
    slack = 1e-9 * max(abs(first), abs(last))
    if not first - slack <= budget <= last + slack:
        raise UserError(f"expected a budget from {first:g} to {last:g}, found {budget:g}; widen lowest and highest")
    pieces: list[tuple[float, int, float]] = []
    for unit, (x, y) in enumerate(zip(gains, costs, strict=True)):
        distinct = np.concatenate([[True], np.diff(x) > 0])
        x, y = x[distinct], y[distinct]
        hull = lower_hull(x, y)
        for a, b in zip(hull[:-1], hull[1:], strict=True):
            pieces.append(((y[b] - y[a]) / (x[b] - x[a]), unit, x[b] - x[a]))
    found = gains[:, 0].copy()
    left = budget - first
    # Slopes rise along every hull, so that a unit's pieces come in their order; equal ones are stable.
    for _, unit, length in sorted(pieces, key=lambda piece: piece[0]):
        taken = min(length, left)
        if taken <= 0:
            break
        found[unit] += taken
        left -= taken
    return found


def divide(levels: Array, costs: Array, weights: Array, mean: float, step: float = 0.01) -> Array:
    """Shares s ``[U]`` between the first and the last of rising ``levels`` ``[K]`` that make Σ c_u(s_u) least, with
    Σ w_u·s_u = ``mean``·Σ w_u.

    ``costs`` ``[U, K]`` are measured at the levels and interpolated every ``step``.
    """
    fine = np.unique([*np.arange(levels[0], levels[-1], step), levels[-1]])
    curves = np.array([monotone_curve(levels, c, fine) for c in costs])
    return allocate(np.outer(weights, fine), curves, mean * weights.sum()) / weights
