"""One pass of the calibration tokens through a block, on the dense and on the compressed path side by side.

A block of the plain decoder is a coroutine (:mod:`tulle.models.decoder`): every batch is run up to a group of linears
and parked there until the group is compressed. So each path costs one forward pass per block, however many groups the
recipe compresses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from tulle.compression.hidden_states import Parking
from tulle.core.head_grids import HeadGrids
from tulle.models.batches import real_tokens
from tulle.models.decoder import DecoderBlock, GroupInput, Steps, run_group
from tulle.models.description import LinearGroup


class ParkedBatches:
    """The batches of one stream of hidden states on their way through a block, all parked at the same group."""

    def __init__(self, block: DecoderBlock, hidden: Iterable[Tensor], parking: Parking, heads: HeadGrids | None = None):
        self.block, self._parking = block, parking
        self._steps: list[Steps] = []
        self.given: list[GroupInput] = []
        """What each batch gives to the group it is parked at."""
        for states in hidden:
            self._steps.append(block.steps(states, heads))
            self.given.append(self._park(next(self._steps[-1])))

    def outputs(self, batch: int) -> tuple[Tensor, ...]:
        """Outputs of the group's linears, as they are in the block now."""
        given = self.given[batch]
        return run_group(self.block, given.group, given.x)

    def send(self, batch: int, outputs: tuple[Tensor, ...]) -> Tensor | None:
        """Lets a batch go on to the next group; the block's output ``[B, T, d]`` behind the last one."""
        before = self.given[batch]
        try:
            self.given[batch] = self._park(self._steps[batch].send(outputs), before)
            return None
        except StopIteration as end:
            return cast(Tensor, end.value)

    def _park(self, given: GroupInput, before: GroupInput | None = None) -> GroupInput:
        given.x = self._parking.keep(given.x)
        # Within mixer and feed-forward the stream does not change: it lies where it lay.
        if before is None or given.residual is not before.residual:
            given.residual = self._parking.keep(given.residual)
        return given


class Gap:
    """Σ|ŷ − y|² and Σ|y|² per name, over real tokens: how far the compressed path is from the dense one."""

    def __init__(self) -> None:
        self._lost: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)

    def add(self, name: str, reference: Tensor, found: Tensor, valid: Tensor | None) -> None:
        """Takes outputs ``[B, T, C]`` of both paths; ``valid``: bool ``[B, T]``, None: all are real."""
        wanted, seen = real_tokens(reference, valid), real_tokens(found, valid)
        self._lost[name] += _square_sum(seen - wanted)
        self._total[name] += _square_sum(wanted)

    def share(self, name: str) -> float:
        """Σ|ŷ − y|²/Σ|y|²."""
        return self._lost[name] / max(self._total[name], 1e-30)


def _square_sum(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2


def advance(
    dense: ParkedBatches, compressed: ParkedBatches, group: LinearGroup, valid: Sequence[Tensor | None], gap: Gap
) -> list[tuple[Tensor, Tensor]]:
    """Lets every batch go on behind ``group``, comparing its linears' outputs; the outputs of both blocks, dense
    first, when it was the last group."""
    ends = []
    for i, real in enumerate(valid):
        wanted, found = dense.outputs(i), compressed.outputs(i)
        for name, y, z in zip(group.names, wanted, found, strict=True):
            gap.add(name, y, z, real)
        end = dense.send(i, wanted), compressed.send(i, found)
        if end[0] is not None and end[1] is not None:
            ends.append((end[0], end[1]))
    return ends
