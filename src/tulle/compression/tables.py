"""Quantises the embedding and the output head: tables ``[V, d]`` that stand outside the blocks.

A head is a linear on what the final norm gives, so GPTQ takes the Hessian of that. A tied table is both: it is
quantised as the head, with the dense model's Hessian, before the first block, so that the blocks see the embedding
that will be stored. An untied embedding has no inputs; its Hessian is the identity. Rows are independent of each other
and are done in parts: memory is a part in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tulle.compression.recipe import Recipe, Step
from tulle.core.grid import Grid, Quantised, joined
from tulle.core.hessian import Hessian
from tulle.errors import UserError
from tulle.methods.contract import LinearState, Statistics
from tulle.models.description import TABLES

ROWS = 8192
"""Of a part."""


def table_steps(tied: bool, recipe: Recipe) -> dict[str, Step]:
    """Which step quantises ``embedding`` and ``head``; where they are tied, the embedding is both. Raises ``UserError``
    where the recipe has a step for each of them and the model has one table."""
    quantisers = [step for step in recipe.steps if "codes" in step.method.settles]
    found = {role: step for step in quantisers for role in TABLES if role in step.targets}
    if not tied or not found:
        return found
    if len({id(step) for step in found.values()}) > 1:
        raise UserError(
            "expected one step for embedding and head of a model that ties them, found two; give both to one step"
        )
    return {"embedding": next(iter(found.values()))}


def quantised_parts(
    step: Step, role: str, name: str, table: Tensor, statistics: Statistics, grid: Grid | None
) -> Iterator[LinearState]:
    """``ROWS`` rows after the others."""
    for rows in table.split(ROWS):
        weight = rows.float()
        state = LinearState(name, weight, weight, role, allotted_grid=grid)
        method = step.method.at(state)
        assert method is not None
        method.apply_linear(state, statistics)
        yield state


def quantise_table(
    step: Step, role: str, name: str, table: Tensor, hessian: Hessian | None, grid: Grid | None = None
) -> LinearState:
    """A table ``[V, d]`` after the step; ``name`` is its module's, ``hessian`` of its inputs, None: it has none.
    ``grid``: instead of the step's."""
    if hessian is None:
        hessian = Hessian.identity(table.shape[1], table.device)
    statistics = Statistics(tokens=hessian.tokens, hessian=hessian)
    parts: list[Quantised] = []
    notes: dict[str, None] = {}
    for state in quantised_parts(step, role, name, table, statistics, grid):
        assert state.quantised is not None
        parts.append(state.quantised)
        notes |= dict.fromkeys(state.notes)
    whole = joined(parts)
    return LinearState(name, whole.dequantise(), table, role, quantised=whole, notes=list(notes))


def layer_table_grid(step: Step, name: str, width: int) -> Grid | None:
    """The grid of the table that gives layers inputs of their own, ``width`` numbers each: the step's, a layer's part
    being what it takes for a row. None where the step's groups do not fit into that, or one scale serves a tensor."""
    size = getattr(step.method, "group_size", None)
    if isinstance(size, int) and width % size:
        return None
    row = torch.ones(1, width)
    statistics = Statistics(tokens=1, hessian=Hessian.identity(width, row.device))
    (state,) = quantised_parts(step, "embedding", name, row, statistics, None)
    assert state.quantised is not None
    grid = state.quantised.grid
    return None if grid.format == "nvfp4" else replace(grid, group_size=grid.group_size or width)


def relative_error(table: Tensor, rounded: Tensor) -> float:
    """‖W − Ŵ‖²/‖W‖²."""
    lost = total = 0.0
    for before, after in zip(table.split(ROWS), rounded.split(ROWS), strict=True):
        lost += float((before.float() - after).double().square().sum())
        total += float(before.double().square().sum())
    return lost / max(total, 1e-30)
