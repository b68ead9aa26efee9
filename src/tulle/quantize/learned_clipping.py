"""Learnable weight clipping: OmniQuant, Shao et al. 2023 (section 3.2), as DuQuant + LWC takes it.

The ends of each row's grid are the row's extremes times sigmoid(γ) and sigmoid(β):

    low = sigmoid(β)·min w,  high = sigmoid(γ)·max w    (eq. 2; both logits start at 4, a ratio of 0.982)

trained per block by AdamW on the mean squared error of the block's output, fed with the compressed model's hidden
states, against the dense block's. The quantiser of weights that follows in the recipe takes the learned ends in place
of the extremes; give it the same grid.

``inputs`` learns the clip ratio of the group's activations as well (FlatQuant's learned activation clipping).
"""

from __future__ import annotations

from dataclasses import dataclass

from tulle.core.contract import BlockState
from tulle.core.learning import Learned, LearnedGroup, Schedule, fake_linears, input_clip, learn_block


@dataclass(frozen=True)
class LearnedClipping(Learned):
    """Learns the ends of the weights' grids; comes after transforms and ``activations``."""

    epochs: int = 20
    rate: float = 5e-3
    """Learning rate: 5e-3 in the paper, 1e-2 in the authors' code."""
    inputs: bool = False

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        groups = {role: LearnedGroup(clip=input_clip(block, role, self.inputs)) for role in roles}
        linears = fake_linears(block, groups, self.grid(), roles, learn_clip=True)
        history = learn_block(block, linears, groups, Schedule(self.epochs, self.rate, self.rate))
        self.keep_clips(block, groups, linears)
        block.notes.append(f"learned clipping: block error {history[0]:.3g} → {min(history):.3g}")
