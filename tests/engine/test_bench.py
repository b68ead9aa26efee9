"""Timing several engines in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tulle.engine import bench
from tulle.errors import UserError


@dataclass
class Clocked:
    """An engine whose every token takes ``cost`` seconds of a clock of the test's own."""

    name: str
    cost: float
    now: list[float]
    log: list[str]
    context: int = 32
    vocabulary: int = 100
    positions: list[int] = field(default_factory=list)

    def forward(self, tokens: list[int], slot: int, position: int, wanted: Any = None) -> np.ndarray:
        self.now[0] += self.cost * len(tokens)
        self.log.append(self.name)
        self.positions.append(position)
        return np.eye(1, self.vocabulary, 7, dtype=np.float32)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Clocked]:
    now, log = [0.0], list[str]()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    return [Clocked("slow", 3.0, now, log), Clocked("fast", 1.0, now, log)]


def test_each_gets_its_own_seconds_and_they_take_turns(engines: list[Clocked]) -> None:
    told: list[tuple[int, int]] = []
    times = bench.time_in_turn(  # type: ignore[arg-type]
        engines, prompt=5, tokens=4, rounds=3, progress=lambda done, of: told.append((done, of))
    )
    assert told == [(number, 8) for number in range(8)]
    assert times == [[(15.0, 3.0)] * 3, [(5.0, 1.0)] * 3]
    # Four rounds, the first to warm up: a prompt and four tokens of one, then of the other.
    assert engines[0].log == (["slow"] * 5 + ["fast"] * 5) * 4
    assert engines[0].positions == [0, 5, 6, 7, 8] * 4


def test_what_does_not_fit_is_refused_before_anything_runs(engines: list[Clocked]) -> None:
    engines[1].context = 8
    with pytest.raises(UserError, match="context of 8, found 9"):
        bench.time_in_turn(engines, prompt=5, tokens=4, rounds=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one"):
        bench.time_in_turn(engines, prompt=5, tokens=0, rounds=1)  # type: ignore[arg-type]
    assert engines[0].log == []
