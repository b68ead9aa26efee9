"""Log-likelihoods by the engine: what sequences begin with alike is computed once, and changes no score."""

from __future__ import annotations

from pathlib import Path

import pytest

from family_folders import write_family
from tulle.evaluate.engine import EngineModel
from tulle.evaluate.scoring import score_sequences

SCORED = (
    (b"A fox that is quick jumps over a dog.", 30),
    (b"The sky is blue", 11),
    (b"A fox that is quick jumps over a cat.", 30),
    (b"The sky is bright", 12),
    (b"A fox that is quick", 18),
    (b"QQ", 1),
    (b"The sky is blue", 2),
)
"""Sequences, and how many of their tokens are context."""
IN_COMMON = {"A fox .. cat": 18, "A fox .. dog": 29, "blue, again": 1, "bright": 11}
"""Tokens that each has in common with the one before it, in the order of the alphabet, of its context but the last."""


@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2"])
def test_beginnings_in_common(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, context = [list(text) for text, _ in SCORED], [first for _, first in SCORED]
    model = EngineModel(write_family(tmp_path / "model", family, 1), threads=1, cache="f32", head="as stored")
    computed = []
    forward = model.engine.forward
    monkeypatch.setattr(
        model.engine, "forward", lambda tokens, **options: computed.append(len(tokens)) or forward(tokens, **options)
    )
    shared = score_sequences(model, sequences, context)
    tokens, recurrent = sum(computed), family == "lfm2"
    computed.clear()
    model.shares_beginnings = False
    alone = score_sequences(model, sequences, context)
    assert sum(computed) == sum(len(ids) - 1 for ids in sequences)
    assert tokens == sum(computed) - (0 if recurrent else sum(IN_COMMON.values()))
    for one, other in zip(shared, alone, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)
        assert (one.tokens, one.greedy) == (other.tokens, other.greedy)
