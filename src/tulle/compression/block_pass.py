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
        # What stays the same from group to group (the stream within mixer and feed-forward, what a mixture of experts
        # carries, what stands beside the stream) lies where it lay.
        there = [] if before is None else [before.residual, *before.carried, *before.beside.values()]
        kept = {id(tensor): tensor for tensor in there}
        for tensor in (given.x, given.residual, *given.carried, *given.beside.values()):
            if id(tensor) not in kept:
                kept[id(tensor)] = self._parking.keep(tensor)
        given.x, given.residual = kept[id(given.x)], kept[id(given.residual)]
        given.carried = [kept[id(tensor)] for tensor in given.carried]
        given.beside = {name: kept[id(tensor)] for name, tensor in given.beside.items()}
        return given


class Gap:
    """Σ|ŷ − y|² and Σ|y|² per name, over real tokens: how far the compressed path is from the dense one."""

    def __init__(self) -> None:
        self._lost: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)

    def add(self, name: str, wanted: Tensor, found: Tensor) -> None:
        """Takes outputs ``[N, C]`` of both paths for the same real tokens."""
        self._lost[name] += _square_sum(found - wanted)
        self._total[name] += _square_sum(wanted)

    def share(self, name: str) -> float:
        """Σ|ŷ − y|²/Σ|y|²."""
        return self._lost[name] / max(self._total[name], 1e-30)


def matched(dense: GroupInput, compressed: GroupInput, x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows ``[N, C]`` of x, which belongs to ``dense``, for the real tokens that ``compressed`` sees."""
    if dense.tokens is None or compressed.tokens is None:
        return real_tokens(x, valid)
    return compressed.real(x[torch.searchsorted(dense.tokens, compressed.tokens)], valid)


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
        there, here = dense.given[i], compressed.given[i]
        for name, y, z in zip(group.names, wanted, found, strict=True):
            gap.add(name, matched(there, here, y, real), here.real(z, real))
        end = dense.send(i, wanted), compressed.send(i, found)
        if end[0] is not None and end[1] is not None:
            ends.append((end[0], end[1]))
    return ends
