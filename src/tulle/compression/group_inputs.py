"""What the recipe's steps want to know of the inputs of a group of linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tulle.compression.block_pass import matched
from tulle.compression.block_work import BlockWork
from tulle.compression.fitting import Mismatch
from tulle.core.rotation import Extremes
from tulle.core.sample import Reservoir
from tulle.core.transform import run
from tulle.methods.contract import GroupState, Statistic, Statistics
from tulle.models.decoder import GroupInput

SAMPLE = 2048
"""Tokens of an unbiased sample of a group's input."""

Found = tuple[Statistics, Tensor | None]
"""Of one group's input: statistics, and R ``[C_out, C_in]`` where its weights are fitted to the dense model."""


def statistics_of(
    given: Sequence[GroupInput],
    valid: Sequence[Tensor | None],
    needs: frozenset[Statistic],
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    see: Callable[[int, Tensor], None] | None = None,
    seed: int = 0,
) -> Statistics:
    """Of the inputs of every batch, after ``prepare``; ``valid``: bool ``[B, T]`` of real tokens, None: all; ``see`` is
    shown the real tokens ``[T, C_in]``."""
    found = Statistics()
    extremes, reservoir = None, None
    for i, (batch, mask) in enumerate(zip(given, valid, strict=True)):
        x = batch.real(prepare(batch.x), mask)
        if not len(x):
            continue
        found.add(x, needs)
        if see is not None:
            see(i, x)
        if "rows" in needs:
            extremes = extremes or Extremes(x.shape[-1], seed=seed)
            extremes.add(x)
        if "sample" in needs:
            reservoir = reservoir or Reservoir(SAMPLE, seed)
            reservoir.add(x.float())
    found.rows = None if extremes is None else extremes.rows
    found.sample = None if reservoir is None else reservoir.rows
    return found


def compared_inputs(
    work: BlockWork,
    group: GroupState,
    dense: Sequence[GroupInput],
    compressed: Sequence[GroupInput],
    valid: Sequence[Tensor | None],
    needs: frozenset[Statistic],
    to_stream: bool,
    seed: int,
) -> Found:
    """Statistics of a group's input in the compressed block, and how far the dense model's outputs are from those of
    the dense weights there. ``to_stream``: they also make up for the error of the residual stream."""
    transform = group.linears[0].transform
    stream = to_stream and compressed[0].adds
    mismatch = Mismatch(torch.cat([linear.weight for linear in group.linears]), stream)
    scale = work.layer.residual_scale

    def compare(i: int, x: Tensor) -> None:
        there, here = dense[i], compressed[i]
        wanted = matched(there, here, there.x, valid[i])
        wanted = run(transform, wanted.float()) if transform else wanted
        behind = None
        if stream:
            behind = there.real(there.residual, valid[i]) - here.real(here.residual, valid[i])
            behind = behind if scale == 1 else behind / scale
        mismatch.add(wanted, x, behind)

    linear_group = compressed[0].group
    found = statistics_of(compressed, valid, needs, lambda x: work.input_of(linear_group, x), compare, seed)
    return found, mismatch.result()
