"""AffineQuant: Ma et al., ICLR 2024, "AffineQuant: Affine Transformation Quantization for Large Language Models".

A learned invertible matrix A in front of a group, x·A and W·A⁻ᵀ, trained block by block on the mean squared error of
the block's output. A gradual mask keeps A strictly diagonally dominant and so invertible (section 3.3): at epoch e of t
only entries with |i − j| ≤ (e/t)·size are in use, those off the diagonal scaled by α.

    A* = A ∘ GM_e,   GM_ij = 1 (i = j), α (0 < |i − j| ≤ e/t·size), 0 (else)

A starts as the identity; put ``smoothquant`` before it for the authors' start.

Departures: A is block-diagonal with ``block`` channels, one matrix per block, and runs online as it is, for every group
alike (the authors merge a diagonal into norms and a full matrix into v/o, so that nothing runs online, and skip down,
whose massive outliers explode the gradients: that is ``targets: [qkv, o, gate_up]``). It may stand behind a rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tulle.core.transform import BlockMatrix
from tulle.errors import UserError
from tulle.methods.contract import BlockState
from tulle.methods.learning import Learned, LearnedGroup, Schedule, fake_linears, input_clip, learn_block


def gradual_mask(size: int, share: float, alpha: float) -> Tensor:
    """GM ``[size, size]`` at the given share e/t of the epochs."""
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    off = torch.where(distance <= share * size, alpha, 0.0)
    return torch.where(distance == 0, 1.0, off)


@dataclass(frozen=True)
class AffineQuant(Learned):
    """Learned block-diagonal affine maps with learned clipping; comes after ``activations``."""

    block: int = 128
    """Channels that one matrix mixes; a width that it does not divide takes its largest divisor below."""
    alpha: float = 0.1
    """Factor of the entries off the diagonal: their gradients shrink with it."""
    epochs: int = 20
    """Passes over the calibration sequences, per block; the mask opens over them."""
    rate: float = 5e-3
    """Peak learning rate of the matrices."""
    clip_rate: float = 1e-2
    """Peak learning rate of the clip ratios' logits."""
    inputs: bool = True
    """Learn the clip ratio of activations too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise UserError(f"expected a positive block, found {self.block}; try 128")

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        matrices: dict[str, nn.Parameter] = {}
        masks: dict[int, Tensor] = {}

        def current(role: str) -> list[BlockMatrix]:
            return [BlockMatrix(matrices[role] * masks[matrices[role].shape[-1]], orthogonal=False)]

        def widen(step: int, steps: int) -> None:
            share = min(1.0, step / steps + 1 / max(self.epochs, 1))
            for size in masks:
                masks[size] = gradual_mask(size, share, self.alpha)

        for role in roles:
            columns = block.groups[role].linears[0].dense.shape[1]
            size = next(s for s in range(min(self.block, columns), 0, -1) if columns % s == 0)
            matrices[role] = nn.Parameter(torch.eye(size).repeat(columns // size, 1, 1))
            masks[size] = torch.empty(0)
        widen(0, 1)
        groups = {
            role: LearnedGroup(
                partial(current, role), parameters=[matrices[role]], clip=input_clip(block, role, self.inputs)
            )
            for role in roles
        }
        linears = fake_linears(block, groups, self.grid, roles, learn_clip=True)
        schedule = Schedule(self.epochs, self.rate, self.clip_rate)
        history = learn_block(block, linears, groups, schedule, widen, keep_best=False)
        self.keep_clips(block, groups, linears)
        for role in roles:
            (learned,) = current(role)
            block.groups[role].add_transform(BlockMatrix(learned.matrix.detach(), orthogonal=False))
        block.notes.append(f"AffineQuant: block error {history[0]:.3g} → {history[-1]:.3g}")
