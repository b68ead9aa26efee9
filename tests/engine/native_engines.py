"""Native engines of small models, without :class:`tulle.engine.Engine` around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.engine import scaling
from tulle.engine.checkpoint import Checkpoint, Source
from tulle.engine.layout import ModelLayout
from tulle.engine.native_model import Model, ScalingModel, page_count
from tulle.engine.prepare import prepared
from tulle.engine.settings import settings_of
from tulle.models.source import open_source

Tables = Sequence[Sequence[int]]


def decoder(folder: Path, layout: ModelLayout = ModelLayout.SPARSE, bits: int = 16, head: str = "as stored") -> Model:
    """The model of a folder as ``_native.Engine`` takes it; ``bits`` of the inputs of codes."""
    source = Source(open_source(folder))
    file, facts = prepared(source, head, layout, None)
    return settings_of(source, file, facts, bits, range(len(source.description.layers)))


def scaling_transformer(folder: Path, weights: str = "f32") -> ScalingModel:
    return scaling.settings_of(Checkpoint(open_source(folder)), weights, "as stored", None)[1]


class Runner:
    """A native engine and its sizes."""

    def __init__(
        self,
        model: Model | ScalingModel,
        pages: int = 12,
        slots: int = 3,
        context: int = 64,
        batch: int = 64,
        cache: str = "f32",
        threads: int = 1,
        **more: Any,
    ):
        kind = _native.Engine if isinstance(model, Model) else _native.ScalingEngine
        self.native: Any = kind(model, pages, slots, context, batch, cache, threads, **more)  # type: ignore[arg-type]
        self.slots, self.blocks = slots, page_count(context)
        self.vocabulary, self.hidden = model.vocabulary, model.hidden
        self.own: Tables = np.arange(slots * self.blocks).reshape(slots, self.blocks).tolist()

    def tables(self, rows: Tables) -> NDArray[np.int32]:
        """Shorter rows are filled up with −1."""
        found = np.full((self.slots, self.blocks), -1, np.int32)
        for slot, row in enumerate(rows):
            found[slot, : len(row)] = row
        return found

    def _pass(
        self, call: Any, width: int, tokens: Sequence[int], slots: Any, positions: Any, tables: Tables | None, rows: Any
    ) -> NDArray[np.float32]:
        n = len(tokens)
        place = range(positions, positions + n) if isinstance(positions, int) else positions
        wanted = np.asarray(range(n) if rows is None else rows, np.int32)
        outputs = np.empty((len(wanted), width), np.float32)
        call(np.asarray(tokens, np.int32), np.full(n, slots, np.int32), np.asarray(place, np.int32),
             self.tables(self.own if tables is None else tables), wanted, outputs)  # fmt: skip
        return outputs

    def forward(
        self, tokens: Sequence[int], slots: Any = 0, positions: Any = 0, tables: Tables | None = None, rows: Any = None
    ) -> NDArray[np.float32]:
        """Logits; each slot has pages of its own unless ``tables`` says otherwise."""
        return self._pass(self.native.forward, self.vocabulary, tokens, slots, positions, tables, rows)

    def embed(
        self, tokens: Sequence[int], slots: Any = 0, positions: Any = 0, tables: Tables | None = None, rows: Any = None
    ) -> NDArray[np.float32]:
        """Hidden states after the last norm."""
        return self._pass(self.native.embed, self.hidden, tokens, slots, positions, tables, rows)
