"""QuaRot: Ashkboos et al. 2024. Rotates outliers away with randomised Hadamard matrices.

1. The residual stream is multiplied by Q = diag(±1)·H/√d; norm gains are absorbed, every reader and writer and the
   embeddings take their part of Q offline (``tulle.models.rewrite``).
2. v comes out as v·H_h, one Hadamard matrix per head, which o reads; offline.
3. Across heads, o's input is multiplied by H_n ⊗ I at run time, so that its whole width is mixed (H_n ⊗ H_h).
4. down's input is multiplied by H/√C at run time, down offline. Random signs are folded into the rows of up.
5. Queries and keys: the step ``kv_cache`` with ``hadamard``.

Widths that are not powers of two take a Hadamard matrix of a Paley order times a power of two, and where none is known
the largest block that has one (:mod:`tulle.core.hadamard`).

The weights come from any quantiser that follows: ``round_to_nearest`` (QuaRot-RTN) or ``gptq`` (QuaRot-GPTQ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.hadamard import hadamard_matrix
from tulle.core.paley import hadamard_block
from tulle.core.transform import Diagonal, Hadamard, Kronecker
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, Method, Stage, Survey
from tulle.models.description import require_plain_values


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """±1, float32 ``[count]``."""
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


@dataclass(frozen=True)
class QuaRot(Method):
    """The rotations of QuaRot; each can be left out. Targets do not matter."""

    stages: ClassVar[tuple[Stage, ...]] = ("model", "block")
    settles: ClassVar[frozenset[Decision]] = frozenset({"rotation"})

    residual: bool = True
    """Rotate the residual stream, offline."""
    heads: bool = True
    """Rotate v and o, head by head, offline."""
    across_heads: bool = True
    """Rotate o's input across heads, at run time (where the number of heads has a Hadamard matrix)."""
    down: bool = True
    """Rotate down's input, at run time."""

    def settled_roles(self, decision: Decision, roles: Sequence[str]) -> Sequence[str]:
        # Of rotations at run time; targets do not matter. Bases of the stream and the values: see plan.
        return [role for role, rotated in (("o", self.across_heads), ("down", self.down)) if rotated]

    def changes_residual_basis(self, roles: Sequence[str]) -> bool:
        return self.residual

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        if self.heads:
            if survey.values_taken:
                raise UserError(
                    "expected one step that changes the basis of the values, found quarot after another; it would mix "
                    "them again, so leave one of the two out (heads: false)"
                )
            for groups in survey.groups:
                if "o" in groups:
                    require_plain_values(groups["o"].producers)
            survey.values_taken = True
        if not self.residual:
            return
        if survey.residual:
            raise UserError(
                "expected one step that changes the basis of the residual stream, found quarot after another; it would "
                "mix the channels again, so leave one of the two out (residual: false)"
            )
        signs = random_signs(survey.hidden, torch.Generator().manual_seed(survey.seed))
        survey.residual = (Diagonal(signs), Hadamard(hadamard_block(survey.hidden)))

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        # An expert has no o, a layer whose feed-forward is experts alone no down.
        if self.heads and "o" in block.groups:
            block.fold_value_rotation(Hadamard(hadamard_block(block.head_dim)))
        if self.across_heads and "o" in block.groups and hadamard_block(block.heads) == block.heads > 1:
            across = hadamard_matrix(block.heads).float() / block.heads**0.5
            block.groups["o"].add_transform(Kronecker(across, torch.eye(block.head_dim)))
        if self.down and "down" in block.groups:
            width = block.groups["down"].linears[0].dense.shape[1]
            block.fold_diagonal("down", random_signs(width, block.generator()))
            block.groups["down"].add_transform(Hadamard(hadamard_block(width)))
