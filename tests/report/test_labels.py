"""Labels of a scatter plot: beside their markers, on nothing else."""

from __future__ import annotations

import random

import pytest

from tulle.report.labels import Box, place

FRAME = Box(400, 200, 800, 400)


def test_overlap_of_boxes() -> None:
    box = Box(0, 0, 4, 2)
    assert box.overlap(box) == 8
    assert box.overlap(Box(3, 0, 4, 2)) == 2  # one unit wide, two high
    assert box.overlap(Box(0, 0, 1, 10)) == 2  # across
    assert box.overlap(Box(0, 0, 1, 1)) == 1 == Box(0, 0, 1, 1).overlap(box)  # inside
    assert box.overlap(Box(4, 0, 4, 2)) == 0  # side by side
    assert box.outside(FRAME) == 8 - 2  # its upper right quarter is inside


def test_a_lone_label_stands_to_the_right_of_its_marker() -> None:
    marker = Box(400, 200, 20, 20)
    (label,) = place([marker], [(60, 12)], FRAME)
    assert label.y == 200 and label.x - 30 == pytest.approx(400 + 10 + 3)


def test_at_the_right_edge_it_stands_elsewhere_inside() -> None:
    (label,) = place([Box(790, 200, 20, 20)], [(60, 12)], FRAME)
    assert label.outside(FRAME) == pytest.approx(0, abs=1e-6)


def test_a_label_keeps_off_a_line() -> None:
    line = Box(400, 200, 800, 1)
    (label,) = place([Box(400, 200, 20, 20)], [(60, 12)], FRAME, [line])
    assert label.overlap(line) == 0


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_crowded_points_cover_nothing(seed: int) -> None:
    """Twelve points, half of them in a sixth of the frame, each with a label of 90 × 14."""
    rng = random.Random(seed)
    near = [(rng.uniform(330, 470), rng.uniform(130, 270)) for _ in range(6)]
    far = [(rng.uniform(30, 770), rng.uniform(30, 370)) for _ in range(6)]
    markers = [Box(x, y, 16, 16) for x, y in near + far]
    labels = place(markers, [(90.0, 14.0)] * 12, FRAME)
    for i, label in enumerate(labels):
        assert label.outside(FRAME) == pytest.approx(0, abs=1e-6)
        assert all(label.overlap(other) == 0 for other in labels[i + 1 :])
        assert all(label.overlap(marker) == 0 for marker in markers)
    assert labels == place(markers, [(90.0, 14.0)] * 12, FRAME)
