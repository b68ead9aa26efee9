"""Batches on their way through the experts of a block, one of which is in memory at a time.

A block of the plain decoder (:mod:`tulle.models.decoder`) comes to its experts one after the other. Here all batches
are driven up to the first expert and parked there; then every expert is read, sees its tokens of all batches, and is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from tulle.models.decoder import DecoderBlock, GroupInput, drive, run_group
from tulle.models.description import Expert
from tulle.models.routing import Routes

ReadExpert = Callable[[int, int], Mapping[str, Tensor]]
"""Of the numbers of a block and an expert: the expert's tensors by relative name."""
See = Callable[[int, GroupInput], None]
"""Of a batch's number and what it gives to a group of linears, an expert's or another one."""


@contextmanager
def holding(block: DecoderBlock, expert: Expert, read: ReadExpert | None) -> Iterator[Mapping[str, Tensor]]:
    """Gives the block one of its experts for a while; its tensors by relative name."""
    assert read is not None, "blocks with experts need to be told how these are read"
    tensors = read(block.layer.index, expert.index)
    block.hold(expert.index, tensors)
    yield tensors
    block.release(expert.index)


class ParkedBatch:
    """A batch of hidden states ``[B, T, d]``, parked at the first expert of a block."""

    def __init__(
        self,
        block: DecoderBlock,
        hidden: Tensor,
        answer: Callable[[GroupInput], tuple[Tensor, ...]] | None = None,
    ):
        self._block, self._steps = block, block.steps(hidden)
        given, routes = next(self._steps), None
        while given.tokens is None:
            outputs = run_group(block, given.group, given.x) if answer is None else answer(given)
            if given.role == "router":
                routes = block.routes(outputs[0])
            given = self._steps.send(outputs)
        assert routes is not None
        self.given = given
        """What it gives to the group that it is parked at."""
        self.routes: Routes = routes
        """Which experts its tokens go to."""
        self.x = given.carried[0].flatten(0, -2)
        """What experts read, ``[B·T, d]``."""

    def skip(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Goes on to the end without the experts; ``change`` is applied to the sum of their outputs and the shared
        expert's, ``[B·T, d]``, which has only the latter then. The block's output ``[B, T, d]``."""
        end = None
        for expert in self._block.layer.experts:
            if expert.index == len(self._block.layer.experts) - 1:
                self.given.carried[1] = change(self.given.carried[1])
            end = self.pass_by()
        assert end is not None
        return end

    def pass_by(self) -> Tensor | None:
        """Goes on behind an expert as if it gave zeros."""
        end = None
        for _ in range(2):
            rows = len(self.given.x)
            end = self.send(tuple(self.given.x.new_zeros(rows, x.shape[0]) for x in self.given.group.linears))
        return end

    def send(self, outputs: tuple[Tensor, ...]) -> Tensor | None:
        """Goes on to the next group; the block's output ``[B, T, d]`` behind the last one."""
        try:
            self.given = self._steps.send(outputs)
            return None
        except StopIteration as stop:
            end: Tensor = stop.value
            return end


@torch.no_grad()
def outputs(
    block: DecoderBlock, hidden: Iterable[Tensor], read: ReadExpert | None, see: See = lambda batch, given: None
) -> list[Tensor]:
    """Outputs ``[B, T, d]`` of a block without its experts for every batch of ``hidden`` states; experts that tokens go
    to are ``read`` one at a time."""

    def answer(batch: int, given: GroupInput) -> tuple[Tensor, ...]:
        see(batch, given)
        return run_group(block, given.group, given.x)

    if not block.layer.experts:
        return [drive(block.steps(states), partial(answer, i)) for i, states in enumerate(hidden)]
    parked = [ParkedBatch(block, states, partial(answer, i)) for i, states in enumerate(hidden)]
    ends: list[Tensor | None] = []
    for expert in block.layer.experts:
        if not any(len(batch.given.x) for batch in parked):
            ends = [batch.pass_by() for batch in parked]
            continue
        with holding(block, expert, read):
            for _ in expert.groups:
                ends = [batch.send(answer(i, batch.given)) for i, batch in enumerate(parked)]
    return [end for end in ends if end is not None]
