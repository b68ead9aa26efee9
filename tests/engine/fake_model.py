"""A model for the scheduler's tests: its pages hold tokens, and what comes next depends on all tokens of a sequence."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from tulle.engine.kv_cache import PAGE

Integers = NDArray[np.int32]
Floats = NDArray[np.float32]


class FakeModel:
    """``recurrent``: it also keeps a checksum of the tokens so far as its state, and refuses to go on from another."""

    def __init__(self, pages: int, slots: int, vocabulary: int, recurrent: bool = False, seconds: float = 0.0):
        self.vocabulary, self.recurrent = vocabulary, recurrent
        self.batch = 256
        """Tokens of a pass, at most."""
        self.memory = np.full((pages, PAGE), -1, np.int64)
        self.states: list[list[int]] = [[] for _ in range(slots)]
        self.snapshots: dict[int, list[int]] = {}
        self.passes: list[list[tuple[int, int]]] = []
        """Of every pass, its (slot, position)s."""
        self.now = 0.0
        self.seconds = seconds
        """That a token takes by ``clock``."""

    def clock(self) -> float:
        return self.now

    def logits(self, tokens: list[int]) -> Floats:
        """After these tokens."""
        seed = zlib.crc32(np.asarray(tokens, np.int64).tobytes())
        return np.random.default_rng(seed).normal(size=self.vocabulary).astype(np.float32)

    def hidden(self, tokens: list[int]) -> Floats:
        return self.logits(tokens)[:8]

    def _run(self, tokens: Integers, slots: Integers, positions: Integers, tables: Integers) -> list[list[int]]:
        """What each token and all before it in its sequence are, read from the pages."""
        assert len(tokens) == len(slots) == len(positions) and 0 < len(tokens) <= self.batch
        found = []
        self.passes.append(list(zip(slots.tolist(), positions.tolist(), strict=True)))
        self.now += self.seconds * len(tokens)
        for token, slot, position in zip(tokens.tolist(), slots.tolist(), positions.tolist(), strict=True):
            page = tables[slot, position // PAGE]
            assert page >= 0, "a token without a page"
            assert np.sum(tables == page) == 1, "wrote to a page of others"
            self.memory[page, position % PAGE] = token
            used = tables[slot, : position // PAGE + 1]
            past = self.memory[used].reshape(-1)[: position + 1].tolist()
            if self.recurrent:
                assert position == 0 or self.states[slot] == past[:-1], "a state of other tokens"
                self.states[slot] = past
            found.append(past)
        return found

    def forward(
        self, tokens: Integers, slots: Integers, positions: Integers, tables: Integers, rows: Integers, logits: Floats
    ) -> None:
        pasts = self._run(tokens, slots, positions, tables)
        assert logits.shape == (len(rows), self.vocabulary) and np.all(np.diff(rows) > 0)
        for to, row in enumerate(rows.tolist()):
            logits[to] = self.logits(pasts[row])

    def embed(
        self, tokens: Integers, slots: Integers, positions: Integers, tables: Integers, rows: Integers, hidden: Floats
    ) -> None:
        pasts = self._run(tokens, slots, positions, tables)
        for to, row in enumerate(rows.tolist()):
            hidden[to] = self.hidden(pasts[row])

    def save_state(self, slot: int, snapshot: int) -> None:
        self.snapshots[snapshot] = self.states[slot]

    def load_state(self, snapshot: int, slot: int) -> None:
        self.states[slot] = self.snapshots[snapshot]
