"""The best support of a row by trying them all."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def supports(columns: int, kept: int, stripe: int = 0) -> Tensor:
    """Every mask ``[K, columns]`` with ``kept`` entries, or with ``kept`` in each ``stripe`` consecutive ones."""
    every = torch.tensor(list(itertools.product([False, True], repeat=columns)))
    counts = every.reshape(len(every), -1, stripe or columns).sum(-1)
    return every[(counts == kept).all(1)]


def row_errors(row: Tensor, masks: Tensor, hessian: Tensor) -> Tensor:
    """min (w*−w)H(w*−w)ᵀ over w on each mask ``[K, C]``, for w* ``[C]``: one solve per mask, in float64."""
    w, h = row.double(), hessian.double()
    errors = []
    for mask in masks:
        fitted = torch.zeros_like(w)
        fitted[mask] = torch.linalg.solve(h[mask][:, mask], (h @ w)[mask])
        errors.append((w - fitted) @ h @ (w - fitted))
    return torch.stack(errors)
