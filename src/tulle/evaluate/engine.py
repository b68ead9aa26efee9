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
        self.config = SimpleNamespace(vocab_size=self.engine.vocabulary, max_position_embeddings=self.engine.context)

    def score_batch(self, sequences: Sequence[Sequence[int]], skip: Sequence[int]) -> list[Score]:
        """A score of each sequence, whose ``skip[i]`` ≥ 1 first tokens are context."""
        return [self._score(sequence, first) for sequence, first in zip(sequences, skip, strict=True)]

    def _score(self, sequence: Sequence[int], first: int) -> Score:
        logits_TV = self.engine.forward(sequence[:-1], wanted=range(first - 1, len(sequence) - 1))
        targets_T = np.asarray(sequence[first:])
        nats, greedy = 0.0, True
        for start in range(0, len(targets_T), ROWS):
            rows, targets = logits_TV[start : start + ROWS], targets_T[start : start + ROWS, None]
            chosen, largest = np.take_along_axis(rows, targets, 1), rows.max(1, keepdims=True)
            sums = np.exp(rows - largest).sum(1, keepdims=True, dtype=np.float64)
            nats += float((np.log(sums) + largest - chosen).sum(dtype=np.float64))
            greedy = greedy and bool((rows.argmax(1)[:, None] == targets).all())
        return Score(-nats, len(targets_T), greedy)


def load_engine(folder: Path, **options: Any) -> tuple[EngineModel, ModelTokenizer]:
    """Model and tokenizer; ``options`` of :class:`tulle.engine.Engine`."""
    model = EngineModel(folder, **options)
    return model, model.engine.text
