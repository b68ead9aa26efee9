"""PeRQ: permute, rotate, quantise. A permutation *before* a block rotation, folded away where the graph allows.

A block Hadamard can only spread an outlier over its own block: two outliers in one block stay one problem, and a block
without any stays easy. Dealing the channels to the blocks first (zigzag over max|x|, as DuQuant does between its two
rotations) evens the blocks out, and recovers most of what a rotation over the full width gives, at the cost of a block.

    x·P·H_b:  P is folded into the rows of up and gate (down's input) and, within heads, of v (o's input)

so that no gather is left there at run time. The inputs of q/k/v and gate/up come from the residual stream through a
norm; a permutation of theirs can only be folded for the whole model at once, so it stays a gather (``gather``), or is
left out.

With ``rotation: greedy`` the block matrix is DuQuant's greedy one, found on the permuted input. Random signs before H
are folded into norm gain or producer like a smoothing scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tulle.core.paley import hadamard_block
from tulle.core.rotation import greedy_rotation, zigzag
from tulle.core.transform import BlockMatrix, Hadamard, Permutation
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, Method, Stage, Statistic


def zigzag_within_heads(absmax: Tensor, heads: int, kv_heads: int, head_dim: int, block: int) -> Tensor:
    """A zigzag inside every head, alike for the query heads of one KV head: int64 ``[heads·head_dim]``.

    ``block`` divides head_dim; with fewer than two blocks per head there is nothing to permute.
    """
    shared = absmax.reshape(kv_heads, heads // kv_heads, head_dim).amax(1)
    within = torch.stack([zigzag(row, block) for row in shared])[:, None].expand(-1, heads // kv_heads, -1)
    start = head_dim * torch.arange(heads, device=absmax.device).reshape(kv_heads, -1, 1)
    return (within + start).reshape(-1)


@dataclass(frozen=True)
class PeRQ(Method):
    """Permutes, then rotates the inputs of linears in blocks."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"rows", "absmax"})
    settles: ClassVar[frozenset[Decision]] = frozenset({"rotation"})

    block: int = 128
    """Channels that the rotation mixes; a width it does not divide takes its largest fitting divisor. 0: the whole
    width, where it has a Hadamard matrix."""
    permute: bool = True
    """Deal the channels to the blocks before the rotation."""
    gather: bool = True
    """Permute at run time where the permutation cannot be folded."""
    rotation: Literal["hadamard", "greedy"] = "hadamard"
    """The matrix of a block: a Hadamard matrix with random signs, or DuQuant's search."""
    steps: int = 256
    """Steps of the greedy search."""

    def __post_init__(self) -> None:
        if self.block < 0 or self.block & (self.block - 1):
            raise UserError(f"expected a block of 2, 4, 8, … channels or 0 for all, found {self.block}; try 128")

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for number, role in enumerate(roles):
            group = block.groups[role]
            generator = block.generator(number + 1)
            columns = group.linears[0].dense.shape[1]
            size = min(self.block, columns & -columns) if self.block else hadamard_block(columns)
            if self.rotation == "hadamard":
                signs = torch.randint(0, 2, (columns,), generator=generator).float() * 2 - 1
                if role == "o":
                    heads = signs.reshape(block.kv_heads, -1, block.head_dim)
                    signs = heads[:, :1].expand_as(heads).reshape(-1)
                block.fold_diagonal(role, signs)
            if self.permute and size < columns:
                self._permute(block, role, size)
            if self.rotation == "hadamard":
                group.add_transform(Hadamard(size))
            else:
                rows = group.statistics.rows
                assert rows is not None
                rotation, _ = greedy_rotation(rows.reshape(-1, size), self.steps, generator)
                group.add_transform(BlockMatrix(rotation))

    def _permute(self, block: BlockState, role: str, size: int) -> None:
        group = block.groups[role]
        absmax = group.statistics.absmax
        assert absmax is not None
        if role == "down":
            block.fold_permutation(role, zigzag(absmax, size))
        elif role == "o" and size < block.head_dim:
            block.fold_permutation(role, zigzag_within_heads(absmax, block.heads, block.kv_heads, block.head_dim, size))
        elif self.gather and role != "o":
            group.add_transform(Permutation(zigzag(absmax, size)))
