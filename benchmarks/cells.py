"""What long benchmarks share: a run that was cut short goes on, and sources may be edited while one runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_methods() -> None:
    """Imports every method now: a long run must not meet a source file that was edited meanwhile."""
    from tulle.compression.recipe import METHODS, method_class
    from tulle.methods.train import method as training

    for name in METHODS:
        method_class(name)
    for name in training.METHODS:
        training.method_class(name)


class Cells:
    """The ``cells`` of a JSON file, and what else it says about the run."""

    def __init__(self, file: Path, **facts: Any):
        self.file = file
        self.content: dict[str, Any] = {"cells": {}}
        if file.exists():
            self.content = json.loads(file.read_text())
        self.content |= facts
        file.parent.mkdir(parents=True, exist_ok=True)

    @property
    def all(self) -> dict[str, Any]:
        """Cells by key."""
        cells: dict[str, Any] = self.content["cells"]
        return cells

    def make(self, key: str, make: Callable[[], Any]) -> Any:
        """The cell, measured and written down unless it is there."""
        if key not in self.all:
            self.all[key] = make()
            self.write()
        return self.all[key]

    def write(self) -> None:
        self.file.write_text(json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")


def weight_bytes(model: Path) -> int:
    """Of a GGUF file, or of a folder's safetensors files."""
    return model.stat().st_size if model.is_file() else sum(f.stat().st_size for f in model.glob("*.safetensors"))


def beginning(file: Path, size: int) -> Any:
    """The first ``size`` bytes of a file as a text of one document."""
    from tulle.text.reading import Text

    return Text((file.read_bytes()[:size].decode("utf-8", "ignore"),), False, (file.name,))


def compressed(
    start: Path,
    recipe: dict[str, Any],
    out: Path,
    data: dict[str, Any],
    seed: int,
    documents: int,
    context: int,
    work: Path,
) -> tuple[float, dict[str, Any]]:
    """``start`` by a recipe to ``out``, calibrated on so many training documents of ``data``: bits per byte of its
    held-out text in windows of ``context``, and the report. The token cache lies in ``work``."""
    from tulle.compression.job import compress
    from tulle.hf import load
    from tulle.text.reading import Text
    from tulle.training.corpus import prepare
    from tulle.training.held_out import bits_per_byte
    from tulle.training.recipe import TextData
    from tulle.training.sources import held_out_texts, training_documents

    source = TextData.model_validate(data)
    texts = tuple(d.text for d in training_documents(source, seed, work, held_out_texts(source, work))[:documents])
    report = compress(start, recipe, out, calibration=Text(texts, False), seed=seed, resume=True)
    corpus = prepare(source, seed, work / "data", Path(start))
    return bits_per_byte(load(out, dtype="float32"), corpus, context), report
