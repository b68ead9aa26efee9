"""Small layer problems with correlated inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core.hessian import Hessian
from tulle.methods.contract import LinearState, Statistics


def layer(rows: int, columns: int, tokens: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W ``[rows, columns]`` and X ``[tokens, columns]`` (default 4·columns tokens) with correlated channels
    of unequal size.
    """
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    mixing = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    size = torch.rand(columns, generator=g) * 2 + 0.1
    return w, torch.randn(tokens or 4 * columns, columns, generator=g) @ mixing * size


def statistics(x: Tensor) -> Statistics:
    """All statistics of X ``[T, C_in]``, as the walker would collect them."""
    hessian = Hessian.zeros(x.shape[1])
    hessian.add(x)
    return Statistics(x.shape[0], hessian, x.norm(dim=0), x.abs().amax(0))


def state(weight: Tensor) -> LinearState:
    return LinearState("layer", weight.clone(), weight.clone())
