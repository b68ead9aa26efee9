"""Perplexity and bits per byte.

perplexity = exp(Σ nats / scored tokens); bits per byte = Σ nats / (ln 2 · bytes of the scored text). The first depends
on the tokenizer, the second compares models of different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

from tulle.evaluate.scoring import score_sequences
from tulle.evaluate.text import Protocol, begins_with_bos, describe, passages, resolve_length
from tulle.text.reading import Text


class TextScore(TypedDict):
    """What ``tulle eval`` prints; ``protocol`` says how the figures came about."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    protocol: str


def evaluate_text(
    model: Any,
    tokenizer: Any,
    text: Text,
    protocol: Protocol | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextScore:
    """Scores a text under ``model`` (see :func:`tulle.evaluate.scoring.score_sequences`).

    Raises ``UserError`` if the text is too short, or the length is beyond the model's context.
    """
    protocol = protocol or Protocol()
    length = resolve_length(protocol.length, getattr(model.config, "max_position_embeddings", None))
    windows = passages(text, tokenizer, protocol, length)
    scores = score_sequences(model, [w.ids for w in windows], progress=progress)
    nats = -math.fsum(s.log_likelihood for s in scores)
    tokens, size = sum(s.tokens for s in scores), sum(w.bytes for w in windows)
    return TextScore(
        perplexity=math.inf if nats / tokens >= 700 else math.exp(nats / tokens),  # NaN stays NaN
        bits_per_byte=nats / (math.log(2) * size) if size else math.nan,
        tokens=tokens,
        bytes=size,
        protocol=describe(text, protocol, length, len(windows), begins_with_bos(tokenizer, protocol)),
    )


def held_out_text() -> tuple[Text, Protocol]:
    """The text for a model that comes with none: the standard library's held-out modules, every one whole."""
    from tulle.text.standard_library import held_out_text as modules

    return Text.of(modules(), "held-out modules of Python's standard library"), Protocol(whole=True)
