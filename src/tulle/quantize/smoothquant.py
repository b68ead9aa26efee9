"""SmoothQuant: Xiao et al. 2023. Moves outliers of activations into the weights, channel by channel.

    s_j = max|X_j|^α / max|W_j|^(1−α),    X ← X/s,  W ← s·W    (eqs 3-4)

max|W_j| runs over all linears that read the input. 1/s is folded into what feeds them: the norm's gain (q/k/v and
gate/up), the rows of up (down), the rows of v (o). With grouped-query attention a channel of v is read by every query
head of its KV head, so these share one s: the maxima run over them too. Nothing is left at run time.

Departure: a channel that no calibration token used, or whose weights are all zero, keeps s = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.contract import BlockState, Method, Stage, Statistic
from tulle.core.grid import row_chunks
from tulle.errors import UserError

SMALLEST = 1e-5
"""Of max|X_j|, max|W_j| and s, as in the authors' code."""


def smoothing(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s ``[C_in]`` of max|X_j| and max|W_j|, each ``[C_in]``."""
    x, w = input_absmax.clamp(min=SMALLEST), weight_absmax.clamp(min=SMALLEST)
    s = (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=SMALLEST)
    return torch.where((input_absmax > 0) & (weight_absmax > 0), s, torch.ones_like(s))


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Smooths the inputs of linears; comes before any transform of them."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"absmax"})

    alpha: float = 0.5
    """How much of the difficulty moves to the weights; DuQuant takes 0.6."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"expected alpha from 0 to 1, found {self.alpha}; SmoothQuant takes 0.5, DuQuant 0.6")

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for role in roles:
            group = block.groups[role]
            x = group.statistics.absmax
            assert x is not None
            w = torch.stack([_column_absmax(linear.dense) for linear in group.linears]).amax(0)
            if role == "o":
                x, w = (_over_query_heads(v, block) for v in (x, w))
            block.fold_diagonal(role, 1 / smoothing(x, w, self.alpha))


def _column_absmax(weight: Tensor) -> Tensor:
    """max|W_j| ``[C_in]``, by chunks of rows that stay in cache."""
    return torch.stack([weight[rows].abs().amax(0) for rows in row_chunks(weight)]).amax(0)


def _over_query_heads(values: Tensor, block: BlockState) -> Tensor:
    """The maximum over the query heads of one KV head, given to each of them."""
    heads = values.reshape(block.kv_heads, -1, block.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)
