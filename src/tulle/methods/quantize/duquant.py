"""DuQuant: Lin et al., NeurIPS 2024, "DuQuant: Distributing Outliers via Dual Transformation Makes Stronger ...".

The input x of a group of linears (already smoothed: put ``smoothquant: {alpha: 0.6}`` first) becomes

    x·R̂₁·P·R̂₂    (eq. 6),

R̂ block-diagonal and orthogonal, P a permutation; the weights take the same from the left, offline. What is left at
run time is two small matrix products and one gather per group: q, k, v share one, gate and up share one.

- R̂ (eqs 3-4): greedy. Each of up to N steps finds the channel with the largest |x|, swaps it to the front of its
  block and multiplies by an orthogonal matrix whose first row is uniform, its other rows mixed by a random orthogonal
  Q′: the outlier is spread evenly. The product up to the best step is kept. One matrix serves all blocks.
- P (eq. 5): zigzag. Channels sorted by max|x| are dealt to the blocks back and forth, so that the blocks' means even
  out.
- R̂₂ is found like R̂₁, on x·R̂₁·P.

Options give the published variants and ablations: ``choose: row_index`` is the public code, which takes the row of the
maximum where the paper takes the channel; ``permutation: random`` or ``none``; ``permutations`` 0 stops after R̂₁,
2 adds another P and R̂. ``rotation: hadamard`` replaces the greedy search by a fixed block Hadamard.

The search needs the tokens that carry the channels' maxima, not all (``Statistics.rows``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tulle.core.rotation import greedy_rotation, random_permutation, zigzag
from tulle.core.transform import BlockMatrix, Hadamard, Permutation, Transform
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, GroupState, Method, Stage, Statistic


def block_size(columns: int, wanted: int) -> int:
    """The largest power of two that divides ``columns`` and is at most ``wanted``."""
    return min(wanted & -wanted, columns & -columns)


@dataclass(frozen=True)
class DuQuant(Method):
    """Dual transformation of the inputs of linears, the permutation at run time."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"rows", "absmax"})
    settles: ClassVar[frozenset[Decision]] = frozenset({"rotation"})

    steps: int = 256
    """N, steps of the greedy search."""
    block: int = 128
    """Channels that a rotation mixes: a power of two. A narrower layer, or one that this does not divide, takes the
    largest power of two that does."""
    permutations: int = 1
    """How many times a permutation and another rotation follow R̂₁."""
    permutation: Literal["zigzag", "random", "none"] = "zigzag"
    """How channels are dealt to the blocks: back and forth by falling maximum, at random, or not at all."""
    rotation: Literal["greedy", "hadamard", "none"] = "greedy"
    """The matrix of a block: the paper's search, a fixed Hadamard matrix, or none."""
    choose: Literal["channel", "row_index"] = "channel"
    """Which channel a greedy step takes: that of the largest input (paper), or the maximum's row (public code)."""

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise UserError(f"expected a block of 2, 4, 8, … channels, found {self.block}; the paper takes 128")
        if self.steps < 1 or self.permutations < 0:
            raise UserError(
                f"expected steps of 1 or more and permutations of 0 or more, found {self.steps} and "
                f"{self.permutations}; the paper takes 256 and 1"
            )

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for number, role in enumerate(roles):
            generator = block.generator(number + 1)
            group = block.groups[role]
            self._rotate(group, generator)
            for _ in range(self.permutations):
                self._permute(group, generator)
                self._rotate(group, generator)

    def _rotate(self, group: GroupState, generator: torch.Generator) -> None:
        rows = group.statistics.rows
        assert rows is not None
        size = block_size(rows.shape[1], self.block)
        if self.rotation == "none" or size < 2:
            return
        transform: Transform = Hadamard(size)
        if self.rotation == "greedy":
            rotation, _ = greedy_rotation(rows.reshape(-1, size), self.steps, generator, self.choose)
            transform = BlockMatrix(rotation)
        group.add_transform(transform)

    def _permute(self, group: GroupState, generator: torch.Generator) -> None:
        absmax = group.statistics.absmax
        assert absmax is not None
        size = block_size(len(absmax), self.block)
        index: Tensor
        if self.permutation == "zigzag":
            index = zigzag(absmax, size)
        elif self.permutation == "random":
            index = random_permutation(len(absmax), generator)
        else:
            return
        group.add_transform(Permutation(index))
