"""Where the labels of a scatter plot go, so that none covers another, a marker or the frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GAPS = (3.0, 9.0, 16.0, 25.0, 36.0, 50.0, 70.0)
"""Distances from the marker's edge that are tried, nearest first."""
DIRECTIONS = 16
SWEEPS = 30
OVERLAP, CROSSING = 1e3, 12.0
"""Costs of covering something and of lying on a line; the cost of distance is the gap itself."""


@dataclass(frozen=True)
class Box:
    """A rectangle, by its middle."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        wide = _common(self.x, self.width, other.x, other.width)
        return wide * _common(self.y, self.height, other.y, other.height)

    def outside(self, frame: Box) -> float:
        """Area that lies outside of ``frame``."""
        return self.width * self.height - self.overlap(frame)


def _common(a: float, length_a: float, b: float, length_b: float) -> float:
    """Length that two intervals share, each given by its middle and length."""
    return max(0.0, min(length_a, length_b, (length_a + length_b) / 2 - abs(a - b)))


def place(
    markers: Sequence[Box], sizes: Sequence[tuple[float, float]], frame: Box, lines: Sequence[Box] = ()
) -> list[Box]:
    """A box for every label of ``sizes`` (width, height), near its marker. All in one unit, such as pixels.

    ``lines`` are thin boxes that a label keeps off where that costs little distance.

    Coordinate descent: each label in turn moves to its best place beside its marker, given where the others are, until
    none moves. The same input gives the same places.
    """
    choices = [_candidates(marker, size) for marker, size in zip(markers, sizes, strict=True)]

    def alone(distance: float, box: Box) -> float:
        """Cost of a place, whatever the other labels do."""
        crossed = sum(box.overlap(line) > 0 for line in lines)
        outside = box.outside(frame)
        return distance + _overlaps(box, markers) + CROSSING * crossed + OVERLAP * (outside > 1e-6) + outside

    fixed = [[alone(*choice) for choice in own] for own in choices]
    # The most hemmed in go first.
    order = sorted(range(len(markers)), key=lambda i: -sorted(fixed[i])[len(fixed[i]) // 2])
    placed: dict[int, Box] = {}
    for _ in range(SWEEPS):
        moved = False
        for i in order:
            others = [box for j, box in placed.items() if j != i]
            best = min(
                range(len(choices[i])), key=lambda c: fixed[i][c] + _overlaps(choices[i][c][1], others)
            )  # the first of equals: the nearest
            moved |= placed.get(i) != choices[i][best][1]
            placed[i] = choices[i][best][1]
        if not moved:
            break
    return [placed[i] for i in range(len(markers))]


def _candidates(marker: Box, size: tuple[float, float]) -> list[tuple[float, Box]]:
    """(cost of distance and direction, box) beside a marker, to its right first."""
    width, height = size
    found = []
    for gap in GAPS:
        for number in range(DIRECTIONS):
            angle = 2 * math.pi * number / DIRECTIONS
            cos, sin = math.cos(angle), math.sin(angle)
            # Along each axis the box stands off by as much of its half as the direction has of that axis.
            x = marker.x + cos * (marker.width / 2 + gap) + max(-1.0, min(1.0, 1.6 * cos)) * width / 2
            y = marker.y + sin * (marker.height / 2 + gap) + max(-1.0, min(1.0, 1.6 * sin)) * height / 2
            slanted = 1.5 * (min(abs(cos), abs(sin)) > 0.1)
            found.append((gap + slanted + 1.0 - cos, Box(x, y, width, height)))
    return found


def _overlaps(box: Box, others: Sequence[Box]) -> float:
    areas = [area for other in others if (area := box.overlap(other)) > 0]
    return OVERLAP * len(areas) + sum(areas)
