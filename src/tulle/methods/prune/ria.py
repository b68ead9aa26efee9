"""RIA: Zhang, Bai, Lin, Zhao, Hou, Cannistraci 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for
Large Language Models" (ICLR).

Relative importance RI_ij = |W_ij|/Σ_i|W_ij| + |W_ij|/Σ_j|W_ij|: the weight's share of its input channel's column and of
its output channel's row, so that no channel loses nearly all of its weights. Relative importance and activations
RIA_ij = RI_ij·‖X_j‖₂^a with a = 0.5, compared within each output row, or in every M consecutive entries of a row for
N:M. The paper's permutation of channels for N:M is a step of its own.

``refit`` and ``swaps`` are ours, as in Wanda, and off by default.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tulle.errors import UserError
from tulle.methods.pruner import ScorePruner


def relative_importance(weight: Tensor) -> Tensor:
    """RI ``[C_out, C_in]``; 0 in rows and columns that are zero throughout."""
    size = weight.abs()
    column, row = size.sum(0), size.sum(1, keepdim=True)
    return size / column.masked_fill(column == 0, 1.0) + size / row.masked_fill(row == 0, 1.0)


def ria_score(weight: Tensor, column_norm: Tensor, power: float = 0.5) -> Tensor:
    """RI·‖X_j‖₂^a ``[C_out, C_in]`` for W ``[C_out, C_in]``, ‖X_j‖₂ ``[C_in]`` and a = ``power``."""
    return relative_importance(weight) * column_norm**power


@dataclass(frozen=True)
class RIA(ScorePruner):
    """Prunes by relative importance times a power of the input norm, the same share of every output row."""

    power: float = 0.5
    """a; 0 ignores the activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power < float("inf"):
            raise UserError(f"expected a power >= 0, found {self.power}; the paper uses 0.5")

    def score(self, weight: Tensor, column_norm: Tensor) -> Tensor:
        return ria_score(weight, column_norm, self.power)
