"""Compression recipes inside a training run, calibrated on the text that is trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

from tulle.compression.job import compress
from tulle.compression.recipe import Recipe
from tulle.text.reading import Text
from tulle.training.model_folder import unpack
from tulle.training.recipe import TextData
from tulle.training.sources import held_out_texts, training_documents

CALIBRATION_DOCUMENTS = 1024
"""Training documents that a step may draw its calibration text from."""


def prune(source: Path, recipe: Recipe, data: TextData, target: Path, *, seed: int, cache: Path) -> None:
    """Prunes or rotates a dense folder into a dense float32 one; the report lies beside the weights.

    ``recipe`` has steps that leave plain dense weights (:mod:`tulle.training.plan` sees to that). It is calibrated on
    ``data``; ``cache`` is a folder for text that must be fetched. Raises ``UserError`` as :func:`tulle.compress` does.
    """
    packed = target.with_name(target.name + "-packed")
    compress(source, recipe, packed, calibration=_text(data, seed, cache), seed=seed, resume=True)
    unpack(packed, target)
    for report in packed.glob("report.*"):
        shutil.copyfile(report, target / report.name)
    shutil.rmtree(packed)


def pack_stage(source: Path, recipe: Recipe, data: TextData, target: Path, *, seed: int, cache: Path) -> None:
    """Compresses a dense folder into a packed one, by any recipe; otherwise as :func:`prune`."""
    compress(source, recipe, target, calibration=_text(data, seed, cache), seed=seed, resume=True)


def _text(data: TextData, seed: int, cache: Path) -> Text:
    """The first training documents in seeded order."""
    documents = training_documents(data, seed, cache, held_out_texts(data, cache))[:CALIBRATION_DOCUMENTS]
    return Text(tuple(document.text for document in documents), False, ("training text of the stage",))
