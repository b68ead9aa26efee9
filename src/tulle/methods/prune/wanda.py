"""Wanda: Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models".

Score S_ij = |W_ij|·‖X_j‖₂ (eq. 1), compared within each output row (section 3), or in every M consecutive
entries of a row for N:M.

An option of ours: ``refit`` replaces the kept weights by the exact least-squares fit on the same mask, and ``swaps``
improves the mask for that. Both are off by default, because a method that leaves the kept weights alone and needs the
column norms only is what Wanda means.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tulle.methods.pruner import ScorePruner


def wanda_score(weight: Tensor, column_norm: Tensor) -> Tensor:
    """|W|·‖X_j‖₂ ``[C_out, C_in]`` for W ``[C_out, C_in]`` and ‖X_j‖₂ ``[C_in]``."""
    return weight.abs() * column_norm


@dataclass(frozen=True)
class Wanda(ScorePruner):
    """Prunes by weight times input norm, the same share of every output row."""

    def score(self, weight: Tensor, column_norm: Tensor) -> Tensor:
        return wanda_score(weight, column_norm)
