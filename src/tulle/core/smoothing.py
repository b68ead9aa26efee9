"""Moving outliers of activations into the weights, channel by channel (SmoothQuant, Xiao et al. 2023, eqs 3-4).

s_j = max|X_j|^α / max|W_j|^(1−α),    X ← X/s,  W ← s·W
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core.contract import BlockState
from tulle.core.grid import row_chunks

SMALLEST = 1e-5
"""Of max|X_j|, max|W_j| and s, as in the authors' code."""


def smoothing(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s ``[C_in]`` of max|X_j| and max|W_j|, each ``[C_in]``; 1 where either is zero."""
    x, w = input_absmax.clamp(min=SMALLEST), weight_absmax.clamp(min=SMALLEST)
    s = (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=SMALLEST)
    return torch.where((input_absmax > 0) & (weight_absmax > 0), s, torch.ones_like(s))


def group_smoothing(block: BlockState, role: str, alpha: float) -> Tensor:
    """s ``[C_in]`` of a role's group: max|W_j| over all its linears; for o, over the query heads of a KV head too."""
    group = block.groups[role]
    x = group.statistics.absmax
    assert x is not None
    w = torch.stack([_column_absmax(linear.dense) for linear in group.linears]).amax(0)
    if role == "o":
        x, w = (_over_query_heads(values, block) for values in (x, w))
    return smoothing(x, w, alpha)


def _column_absmax(weight: Tensor) -> Tensor:
    """max|W_j| ``[C_in]``, by chunks of rows that stay in cache."""
    return torch.stack([weight[rows].abs().amax(0) for rows in row_chunks(weight)]).amax(0)


def _over_query_heads(values: Tensor, block: BlockState) -> Tensor:
    """The maximum over the query heads of one KV head, given to each of them."""
    heads = values.reshape(block.kv_heads, -1, block.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)
