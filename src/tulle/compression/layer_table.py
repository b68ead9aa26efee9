"""Quantises the table that gives layers inputs of their own (Gemma 4), with the embedding's step.

Its rows ``[V, layers · width]`` are looked up like the embedding's, and it may be larger than the rest of the model: so
it is done part by part, and read back from the file that it was written to.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from tulle.compression.recipe import Step
from tulle.compression.report import table_report
from tulle.compression.run_folder import RunFolder, State
from tulle.compression.tables import layer_table_grid, quantised_parts
from tulle.core.grid import Grid
from tulle.core.hessian import Hessian
from tulle.format.spec import LinearSpec
from tulle.hf.pack import packed_tensors, spec_of
from tulle.methods.contract import LinearState, Statistics
from tulle.models.checkpoint import require_finite, unpacked_rows
from tulle.models.description import PerLayerEmbedding
from tulle.models.rewrite import DenseModel
from tulle.models.state import TokenInputs
from tulle.models.tensor_file import TensorFile


class LayerTable:
    """The table of a model, in the codes of ``grid``."""

    def __init__(
        self, dense: DenseModel, settings: PerLayerEmbedding, run: RunFolder, state: State, step: Step, grid: Grid
    ):
        self._dense, self._settings, self._run, self._state = dense, settings, run, state
        self._step, self._grid = step, grid
        self.name, self._module = settings.table, settings.table.removesuffix(".weight")

    @classmethod
    def of(cls, dense: DenseModel, run: RunFolder, state: State, tables: Mapping[str, Step]) -> LayerTable | None:
        """None where there is no such table, or no step for it, or one that does not fit into a layer's part."""
        settings, step = dense.description.per_layer, tables.get("embedding")
        if settings is None or step is None:
            return None
        grid = layer_table_grid(step, settings.table, settings.width)
        return None if grid is None else cls(dense, settings, run, state, step, grid)

    def tensors(self) -> dict[str, Tensor]:
        """What gives layers inputs of their own, by full name; the table's part of the report joins the state."""
        begun = time.perf_counter()
        tensors = self._dense.per_layer_tensors()
        table = tensors.pop(self.name)
        require_finite(self.name, table)
        hessian = Hessian.identity(table.shape[1], table.device)
        statistics = Statistics(tokens=hessian.tokens, hessian=hessian)
        packed: dict[str, list[Tensor]] = {}
        lost = total = 0.0
        notes: dict[str, None] = {}
        for part in quantised_parts(self._step, "embedding", self._module, table, statistics, self._grid):
            assert part.quantised is not None
            lost += float((part.weight - part.quantised.dequantise()).double().square().sum())
            total += float(part.weight.double().square().sum())
            notes |= dict.fromkeys(part.notes)
            for suffix, tensor in packed_tensors(part, spec_of(part, table.dtype), table.dtype).items():
                packed.setdefault(suffix, []).append(tensor)
        seconds = time.perf_counter() - begun
        self._state.count({self._step.name: seconds})
        self._state.specs[self._module] = self._spec.to_json()
        linear = LinearState(self._module, table, table, "embedding", notes=list(notes))
        self._state.tables.append(table_report(linear, self._spec, lost / max(total, 1e-30), seconds))
        return tensors | {f"{self._module}.{suffix}": torch.cat(parts) for suffix, parts in packed.items()}

    def inputs(self) -> TokenInputs:
        """The inputs that the codes give, once :meth:`tensors` are written."""
        return TokenInputs(self._dense.description, self._read)

    @cached_property
    def _spec(self) -> LinearSpec:
        grid, layers = self._grid, len(self._dense.description.layers)
        row = self._dense.read_part(self.name, torch.zeros(1, dtype=torch.long)).float()
        statistics = Statistics(tokens=1, hessian=Hessian.identity(row.shape[1], row.device))
        (part,) = quantised_parts(self._step, "embedding", self._module, row, statistics, grid)
        shape = self._settings.tensors(layers, self._dense.description.hidden)[self.name]
        return replace(spec_of(part, row.dtype), shape=(shape[0], shape[1]))

    @cached_property
    def _written(self) -> TensorFile:
        return TensorFile(self._run.shard(0))

    def _read(self, name: str, rows: Tensor | None = None, columns: slice | None = None) -> Tensor:
        if name != self.name:
            return self._dense.read_part(name, rows, columns)
        places = None if rows is None else rows.numpy()
        return unpacked_rows(self._written.tensor, self._module, self._spec, places, columns)
