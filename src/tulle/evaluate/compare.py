"""Perplexity before and after compression, for the report."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tulle.evaluate.loading import load_model
from tulle.evaluate.perplexity import evaluate_text
from tulle.evaluate.text import Protocol
from tulle.text.reading import Text


def compare(
    dense: Path,
    compressed: Path,
    text: Text,
    protocol: Protocol,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """``{"protocol", "dense": {perplexity, bits_per_byte, tokens, bytes}, "compressed": {…}}``.

    One model is in memory at a time.
    """
    found: dict[str, Any] = {}
    for which, folder in (("dense", dense), ("compressed", compressed)):
        model, tokenizer = load_model(folder, device)

        def tell(done: int, total: int, stage: str = f"evaluate {which}") -> None:
            if progress is not None:
                progress(stage, done, total)

        score: dict[str, Any] = dict(evaluate_text(model, tokenizer, text, protocol, tell))
        found["protocol"] = score.pop("protocol")
        found[which] = score
        del model
        gc.collect()
    return found
