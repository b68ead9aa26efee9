"""The engine as a model that can be evaluated, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tulle.engine import Engine
from tulle.evaluate.scoring import Score
from tulle.text.tokenizer import ModelTokenizer

ROWS = 16
"""Logits that are exponentiated at a time: few enough to stay in the cache."""


class EngineModel:
    """What scoring needs of a causal language model, computed by the engine."""

    def __init__(self, folder: Path, **options: Any):
        self.engine = Engine(folder, **options)
        self.shares_beginnings = not self.engine.recurrent
        """Keys and values of any beginning can be gone on from; a recurrent state only from its end."""
        self.config = SimpleNamespace(vocab_size=self.engine.vocabulary, max_position_embeddings=self.engine.context)

    def score_batch(self, sequences: Sequence[Sequence[int]], skip: Sequence[int]) -> list[Score]:
        """A score of each sequence, whose ``skip[i]`` ≥ 1 first tokens are context.

        What a sequence has in common with the one before it is not computed again.
        """
        scores, before = [], list[int]()
        for sequence, first in zip(sequences, skip, strict=True):
            known = _common(before, sequence, first - 1) if self.shares_beginnings else 0
            scores.append(self._score(sequence, first, known))
            before = list(sequence[:-1])
        return scores

    def _score(self, sequence: Sequence[int], first: int, known: int) -> Score:
        """``known`` < ``first``: tokens whose keys and values the engine holds."""
        wanted = range(first - 1 - known, len(sequence) - 1 - known)
        logits_TV = self.engine.forward(sequence[known:-1], positions=known, wanted=wanted)
        targets_T = np.asarray(sequence[first:])
        nats, greedy = 0.0, True
        for start in range(0, len(targets_T), ROWS):
            rows, targets = logits_TV[start : start + ROWS], targets_T[start : start + ROWS, None]
            chosen, largest = np.take_along_axis(rows, targets, 1), rows.max(1, keepdims=True)
            sums = np.exp(rows - largest).sum(1, keepdims=True, dtype=np.float64)
            nats += float((np.log(sums) + largest - chosen).sum(dtype=np.float64))
            greedy = greedy and bool((rows.argmax(1)[:, None] == targets).all())
        return Score(-nats, len(targets_T), greedy)


def _common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """Tokens that two sequences begin with, of the first ``limit``."""
    pairs = zip(one[:limit], other[:limit], strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other), limit))


def load_engine(folder: Path, **options: Any) -> tuple[EngineModel, ModelTokenizer]:
    """Model and tokenizer; ``options`` of :class:`tulle.engine.Engine`."""
    model = EngineModel(folder, **options)
    return model, model.engine.text
