"""Learnable weight clipping: OmniQuant, Shao et al. 2023 (section 3.2), as DuQuant + LWC takes it.

The ends of each row's grid are the row's extremes times sigmoid(γ) and sigmoid(β):

    low = sigmoid(β)·min w,  high = sigmoid(γ)·max w    (eq. 2; both logits start at 4, a ratio of 0.982)

trained per block by AdamW on the mean squared error of the block's output, fed with the compressed model's hidden
states, against the dense block's. The quantiser of weights that follows in the recipe takes the learned ends in place
of the extremes; give it the same grid.

``inputs`` learns the clip ratio of the group's activations as well (FlatQuant's learned activation clipping).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from tulle.core.contract import BlockState, Method, Stage
from tulle.core.grid import Grid
from tulle.core.learning import LearnedGroup, Schedule, fake_linears, learn_block


@dataclass(frozen=True)
class LearnedClipping(Method):
    """Learns the ends of the weights' grids; comes after transforms and ``activations``."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    learns: ClassVar[bool] = True

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    epochs: int = 20
    rate: float = 5e-3
    """Learning rate: 5e-3 in the paper, 1e-2 in the authors' code."""
    inputs: bool = False

    def __post_init__(self) -> None:
        self._grid()

    def _grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self._grid().check(name, shape[1])

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        groups = {}
        for role in roles:
            grid = block.groups[role].linears[0].input_grid
            clip = nn.Parameter(torch.tensor(4.0)) if self.inputs and grid is not None else None
            groups[role] = LearnedGroup(clip=clip)
        linears = fake_linears(block, groups, self._grid(), roles, learn_clip=True)
        history = learn_block(block, linears, groups, Schedule(self.epochs, self.rate, self.rate))
        for role in roles:
            ratio = groups[role].input_clip()
            for linear in block.groups[role].linears:
                fake = linears[linear.name]
                low, high = fake.clip.ranges(fake.folded(), self._grid())
                linear.ranges = (low.detach(), high.detach())
                if ratio is not None and linear.input_grid is not None:
                    linear.input_grid = replace(linear.input_grid, clip=float(ratio))
        block.notes.append(f"learned clipping: block error {history[0]:.3g} → {min(history):.3g}")
