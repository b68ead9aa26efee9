"""The engine as a model that can be evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tulle.engine import Engine
from tulle.models.source import open_source


class EngineModel:
    """What scoring needs of a causal language model of transformers, computed by the engine."""

    def __init__(self, folder: Path, **options: Any):
        self.engine = Engine(folder, **options)
        self.config = SimpleNamespace(vocab_size=self.engine.vocabulary, max_position_embeddings=self.engine.context)

    def parameters(self) -> Iterator[Tensor]:
        """One, which says that this runs on the CPU."""
        yield torch.zeros(())

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """``logits`` ``[B, T, V]``; every row is a sequence of its own."""
        rows = [torch.from_numpy(self.engine.forward(row.tolist())) for row in input_ids]
        return SimpleNamespace(logits=torch.stack(rows))


def load_engine(folder: Path, **options: Any) -> tuple[EngineModel, Any]:
    """Model and tokenizer; ``options`` of :class:`tulle.engine.Engine`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(open_source(folder).tokenizer, local_files_only=True)
    return EngineModel(folder, **options), tokenizer
