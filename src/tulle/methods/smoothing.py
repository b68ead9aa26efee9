"""Moving outliers of activations into the weights, channel by channel (SmoothQuant, Xiao et al. 2023, eqs 3-4).

s_j = max|X_j|^α / max|W_j|^(1−α),    X ← X/s,  W ← s·W
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tulle.core.grid import row_chunks
from tulle.methods.contract import BlockState

Size = Literal["max", "rms"]
SMALLEST = 1e-5
"""Of max|X_j|, max|W_j| and s, as in the authors' code."""


def smoothing(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s ``[C_in]`` of max|X_j| and max|W_j|, each ``[C_in]``; 1 where either is zero."""
    x, w = input_absmax.clamp(min=SMALLEST), weight_absmax.clamp(min=SMALLEST)
    s = (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=SMALLEST)
    return torch.where((input_absmax > 0) & (weight_absmax > 0), s, torch.ones_like(s))


def group_smoothing(block: BlockState, role: str, alpha: float, size: Size = "max") -> Tensor:
    """s ``[C_in]`` of a role's group, its linears taken together; for o, the query heads of a KV head too.

    ``size`` is what stands for max|X_j| and max|W_j|: the maxima, or with ``rms`` the norms ‖X_j‖₂ and ‖W_j‖₂.
    """
    group = block.groups[role]
    weights = [linear.dense for linear in group.linears]
    if size == "max":
        x = group.statistics.absmax
        w = torch.stack([_columns(weight, lambda part: part.abs().amax(0)).amax(0) for weight in weights]).amax(0)
    else:
        x = group.statistics.column_norm
        w = (
            torch.stack([_columns(weight, lambda part: part.square().sum(0)).sum(0) for weight in weights])
            .sum(0)
            .sqrt()
        )
    assert x is not None
    if role == "o":
        x, w = (_over_query_heads(values, block, size) for values in (x, w))
    return smoothing(x, w, alpha)


def _columns(weight: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``[chunks, C_in]``: a reduction over rows, by chunks that stay in cache."""
    return torch.stack([reduce(weight[rows]) for rows in row_chunks(weight)])


def _over_query_heads(values: Tensor, block: BlockState, size: Size) -> Tensor:
    """The maximum (root of the sum of squares) over the query heads of one KV head, given to each of them."""
    heads = values.reshape(block.kv_heads, -1, block.head_dim)
    shared = heads.amax(1, keepdim=True) if size == "max" else heads.norm(dim=1, keepdim=True)
    return shared.expand_as(heads).reshape(-1)
