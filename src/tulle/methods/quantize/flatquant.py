"""FlatQuant: Sun et al. 2024, "FlatQuant: Flatness Matters for LLM Quantization".

A learned invertible map in front of every group, light enough to run online because it is a Kronecker product:

    x·diag(c)·(P₁ ⊗ P₂),   W·(diag(c)·(P₁ ⊗ P₂))⁻ᵀ,   C_in = a·b,  P₁ [a, a], P₂ [b, b], a ≤ b as near as they come

P₁, P₂ and c are trained block by block on the mean squared error against the dense block, together with the clip
ratios of weights (per row) and activations (per group). c is folded into the norm's gain, up or v; P₁ ⊗ P₂ stays.

Departures: c starts from norms, not from maxima, which a few massive values would set; P₁ and P₂ start as Hadamard
matrices where there are any (the authors: random orthogonal) and are trained as plain matrices, inverted in float64
(the authors: by a singular value decomposition with Cayley factors). The authors' extra map of the key cache is left to
the Hadamard of ``kv_cache``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.hadamard import hadamard_matrix
from tulle.core.paley import hadamard_block
from tulle.core.rotation import random_orthogonal
from tulle.core.transform import Kronecker, Transform
from tulle.methods.contract import BlockState, Statistic
from tulle.methods.learning import Learned, LearnedGroup, LearnedScale, Schedule, fake_linears, input_clip, learn_block
from tulle.methods.smoothing import Size, group_smoothing
from tulle.models.description import ROLES, TARGETS

START: dict[Size, float] = {"rms": 0.5, "max": 0.3}
"""α of the scale that c starts from."""


def factors(columns: int) -> tuple[int, int]:
    """a ≤ b with a·b = ``columns`` and a as large as it can be."""
    a = int(columns**0.5)
    while columns % a:
        a -= 1
    return a, columns // a


def start(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix over √size where there is one, else a random orthogonal matrix."""
    if hadamard_block(size) == size:
        return hadamard_matrix(size).float() / size**0.5
    return random_orthogonal(size, generator)


@dataclass(frozen=True)
class FlatQuant(Learned):
    """Learned Kronecker maps with learned clipping; comes after ``activations``."""

    needs: ClassVar[frozenset[Statistic]] = frozenset({"absmax", "column_norm"})

    start: Size = "rms"
    """c starts as (‖X_j‖/‖W_j‖)^½, or with ``max`` as the authors' SmoothQuant scale of α = 0.3."""
    epochs: int = 15
    """Passes over the calibration sequences, per block."""
    rate: float = 5e-3
    """Peak learning rate of P₁ and P₂."""
    clip_rate: float = 5e-2
    """Of clipping logits and of c: ten times the maps', as the authors have it."""

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        maps = {role: _Maps(block, role, self.start) for role in roles}
        groups = {role: maps[role].group() for role in roles}
        linears = fake_linears(block, groups, self.grid, roles, learn_clip=True)
        history = learn_block(block, linears, groups, Schedule(self.epochs, self.rate, self.clip_rate))
        self.keep_clips(block, groups, linears)
        for role in roles:
            maps[role].install(block)
        block.notes.append(f"FlatQuant: block error {history[0]:.3g} → {min(history):.3g}")


class _Maps:
    """c, P₁ and P₂ of one group. A group that has a transform already takes no c: that is for before it."""

    def __init__(self, block: BlockState, role: str, size: Size):
        linear = block.groups[role].linears[0]
        generator = block.generator((*ROLES, *TARGETS).index(role))
        self.role = role
        self.left, self.right = (nn.Parameter(start(size, generator)) for size in factors(linear.dense.shape[1]))
        self.scale = None
        if not linear.transform:
            self.scale = LearnedScale(block, role, 1 / group_smoothing(block, role, START[size], size))
        self.clip = input_clip(block, role)

    def maps(self) -> list[Transform]:
        return [*([] if self.scale is None else self.scale.maps()), Kronecker(self.left, self.right)]

    def group(self) -> LearnedGroup:
        parameters = [self.left, self.right, *([] if self.scale is None else [self.scale.parameter])]
        return LearnedGroup(self.maps, parameters=parameters, clip=self.clip)

    def install(self, block: BlockState) -> None:
        if self.scale is not None:
            block.fold_diagonal(self.role, self.scale.value().detach())
        block.groups[self.role].add_transform(Kronecker(self.left.detach(), self.right.detach()))
