"""The next token from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings. Raises ``UserError`` for values out of range."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Only so many of the most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it where positive, else multiplied (Keskar et al. 2019)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"expected a temperature of 0 or more, found {self.temperature}; 0 is greedy, 1 neutral")
        if self.top_k < 0:
            raise UserError(f"expected a top-k of 0 or more, found {self.top_k}; 0 takes all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"expected a top-p above 0 and at most 1, found {self.top_p}; 1 takes all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"expected a repetition penalty above 0, found {self.repetition_penalty}; 1 is none")
        if self.seed < 0:
            raise UserError(f"expected a seed of 0 or more, found {self.seed}; any whole number from 0 on will do")


class Sampler:
    """Draws tokens; equal seeds and logits give equal tokens."""

    def __init__(self, settings: Sampling):
        self._settings = settings
        self._generator = np.random.default_rng(settings.seed)

    def choose(self, logits: NDArray[np.float32], seen: Sequence[int] = ()) -> int:
        """A token for logits ``[V]``; ``seen``: the tokens of the sequence so far."""
        s = self._settings
        if s.repetition_penalty != 1 and len(seen):
            logits = logits.copy()
            known = np.unique(np.asarray(seen))
            found = logits[known]
            logits[known] = np.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        tokens, weights = likely(logits.astype(np.float64) / s.temperature, s.top_k, s.top_p)
        return int(self._generator.choice(tokens, p=weights))


def likely(logits: NDArray[np.float64], top_k: int, top_p: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens and probabilities that remain, by falling probability."""
    count = len(logits) if top_k == 0 else min(top_k, len(logits))
    tokens = np.argpartition(-logits, count - 1)[:count]
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    weights = np.exp(logits[tokens] - logits[tokens[0]])
    weights /= weights.sum()
    if top_p < 1:
        # The token that crosses the line is still in.
        last = int(np.searchsorted(weights.cumsum(), top_p)) + 1
        tokens, weights = tokens[:last], weights[:last] / weights[:last].sum()
    return tokens, weights
