"""Learnable weight clipping: OmniQuant, Shao et al. 2023 (section 3.2), as DuQuant + LWC takes it.

The ends of each row's grid are the row's extremes times sigmoid(γ) and sigmoid(β):

    low = sigmoid(β)·min w,  high = sigmoid(γ)·max w    (eq. 2; both logits start at 4, a ratio of 0.982)

trained per block by AdamW on the mean squared error of the block's output, fed with the compressed model's hidden
states, against the dense block's. The quantiser of weights that follows in the recipe takes the learned ends in place
of the extremes; give it the same grid.

``inputs`` learns the clip ratio of the group's activations as well (FlatQuant's learned activation clipping).
``scales`` adds OmniQuant's other half, the learnable equivalent transformation: a scale per input channel, in front of
whatever transforms the input, starting from 1 and folded into the norm's gain, up or v like a smoothing scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tulle.methods.contract import BlockState
from tulle.methods.learning import Learned, LearnedGroup, LearnedScale, Schedule, fake_linears, input_clip, learn_block


@dataclass(frozen=True)
class LearnedClipping(Learned):
    """Learns the ends of the weights' grids; comes after transforms and ``activations``."""

    epochs: int = 20
    """Passes over the calibration sequences, per block."""
    rate: float = 5e-3
    """Learning rate of the clip ratios' logits: 5e-3 in the paper, 1e-2 in the authors' code."""
    inputs: bool = False
    """Learn the clip ratio of the activations too, one per group of linears."""
    scales: bool = False
    """Learn a scale per input channel too (OmniQuant's equivalent transformation)."""
    scale_rate: float = 5e-3
    """Learning rate of the scales' logarithms."""

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        scales, groups = {}, {}
        for role in roles:
            group = LearnedGroup(clip=input_clip(block, role, self.inputs))
            if self.scales:
                scales[role] = LearnedScale(block, role, torch.ones(block.groups[role].linears[0].dense.shape[1]))
                group.before, group.parameters = scales[role].maps, [scales[role].parameter]
            groups[role] = group
        linears = fake_linears(block, groups, self.grid, roles, learn_clip=True)
        history = learn_block(block, linears, groups, Schedule(self.epochs, self.scale_rate, self.rate))
        self.keep_clips(block, groups, linears)
        for role, scale in scales.items():
            block.fold_diagonal(role, scale.value().detach(), in_front=True)
        block.notes.append(f"learned clipping: block error {history[0]:.3g} → {min(history):.3g}")
