"""FlatQuant: Sun et al. 2024, "FlatQuant: Flatness Matters for LLM Quantization".

A learned invertible map in front of every group, light enough to run online because it is a Kronecker product:

    x·diag(c)·(P₁ ⊗ P₂),   W·(diag(c)·(P₁ ⊗ P₂))⁻ᵀ,   C_in = a·b,  P₁ [a, a], P₂ [b, b], a ≤ b as near as they come

P₁, P₂ and c are trained block by block on the mean squared error against the dense block, together with the clip
ratios of weights (per row) and activations (per group). c starts as a smoothing scale (α 0.3) and is folded into the
norm's gain, up or v; P₁ ⊗ P₂ stays.

Departures: P₁ and P₂ start as Hadamard matrices where there are any (the authors: random orthogonal) and are trained
as plain matrices, inverted in float64 (the authors: by a singular value decomposition with Cayley factors). The
authors' extra map of the key cache is left to the Hadamard of ``kv_cache``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.contract import BlockState, Statistic
from tulle.core.hadamard import hadamard_block, hadamard_matrix
from tulle.core.learning import Learned, LearnedGroup, Schedule, fake_linears, input_clip, learn_block
from tulle.core.rotation import random_orthogonal
from tulle.core.smoothing import group_smoothing
from tulle.core.transform import Diagonal, Kronecker, Transform


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

    needs: ClassVar[frozenset[Statistic]] = frozenset({"absmax"})

    alpha: float = 0.3
    """Of the smoothing that c starts from."""
    epochs: int = 15
    rate: float = 5e-3
    clip_rate: float = 5e-2
    """Of clipping logits and of c: ten times the maps', as the authors have it."""

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        maps = {role: _Maps(block, role, self.alpha) for role in roles}
        groups = {role: maps[role].group() for role in roles}
        linears = fake_linears(block, groups, self.grid(), roles, learn_clip=True)
        history = learn_block(block, linears, groups, Schedule(self.epochs, self.rate, self.clip_rate))
        self.keep_clips(block, groups, linears)
        for role in roles:
            maps[role].install(block)
        block.notes.append(f"FlatQuant: block error {history[0]:.3g} → {min(history):.3g}")


class _Maps:
    """c, P₁ and P₂ of one group. A group that has a transform already takes no c: there is nothing to fold it into."""

    def __init__(self, block: BlockState, role: str, alpha: float):
        linear = block.groups[role].linears[0]
        columns = linear.dense.shape[1]
        a, b = factors(columns)
        generator = block.generator(("qkv", "o", "gate_up", "down").index(role))
        self.role = role
        self.left, self.right = (nn.Parameter(start(size, generator)) for size in (a, b))
        self._shape = (block.kv_heads, block.heads // block.kv_heads, block.head_dim)
        self.log_scale = None
        if not linear.transform:
            start_scale = -group_smoothing(block, role, alpha).log()
            if role == "o":
                start_scale = start_scale.reshape(self._shape)[:, 0].reshape(-1)
            self.log_scale = nn.Parameter(start_scale)
        self.clip = input_clip(block, role)

    def scale(self) -> Tensor | None:
        """c ``[C_in]``; for o, equal for the query heads of one KV head."""
        if self.log_scale is None:
            return None
        scale = self.log_scale.exp()
        if self.role != "o":
            return scale
        kv, shared, size = self._shape
        return scale.reshape(kv, 1, size).expand(kv, shared, size).reshape(-1)

    def maps(self) -> list[Transform]:
        scale = self.scale()
        return [*([] if scale is None else [Diagonal(scale)]), Kronecker(self.left, self.right)]

    def group(self) -> LearnedGroup:
        parameters = [p for p in (self.left, self.right, self.log_scale) if p is not None]
        return LearnedGroup(self.maps, parameters, self.clip)

    def install(self, block: BlockState) -> None:
        scale = self.scale()
        if scale is not None:
            block.fold_diagonal(self.role, scale.detach())
        block.groups[self.role].add_transform(Kronecker(self.left.detach(), self.right.detach()))
