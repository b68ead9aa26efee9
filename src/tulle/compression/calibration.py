"""Calibration text → token sequences of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from tulle.errors import UserError
from tulle.models.description import Decoder
from tulle.text.reading import Text, read_text, sequences


def calibration_text(
    calibration: Text | str | Path | Sequence[str | Path] | None,
    separator: str | None = None,
    documents: tuple[int, int] | None = None,
    min_chars: int = 1,
) -> Text:
    """Files, folders or ``datasets`` names as documents (:func:`tulle.text.reading.read_text`), a ready :class:`Text`
    as it is; None takes the source of the installed standard library. Raises ``UserError``."""
    if isinstance(calibration, Text):
        return calibration
    if calibration is None:
        from tulle.text.standard_library import calibration_text as modules

        return Text(tuple(modules()), False, ("source of the installed standard library",))
    files = [calibration] if isinstance(calibration, str | Path) else calibration
    return read_text(files, separator, documents, min_chars)


def calibration_sequences(
    model: Decoder, folder: Path, text: Text, samples: int | None, length: int, seed: int = 0
) -> list[Tensor]:
    """``samples`` token sequences int64 ``[T]`` of the text (None: all), T at most ``length`` and the model's context.

    ``folder`` holds the tokenizer. Raises ``UserError`` for text or a tokenizer that does not fit.
    """
    tokens = sequences(text, _tokenizer(folder), min(length, model.context), samples, seed)
    largest = max(int(t.max()) for t in tokens)
    if largest >= model.vocabulary:
        raise UserError(
            f"expected token ids below vocab_size {model.vocabulary}, found {largest}; "
            "the tokenizer is of another model"
        )
    return tokens


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = (str(error).splitlines() or ["none"])[0]
        raise UserError(f"expected a tokenizer in {folder}, found: {line}") from None
