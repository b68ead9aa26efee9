"""The papers' updates written out naively in float64: one column at a time, the inverse of what remains of H
explicit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def obs_sweep(weight: Tensor, hessian: Tensor, choose: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Compresses columns left to right; ``choose(j, W, [H_F⁻¹]_jj)`` gives ŵ_j for the weights as updated so
    far.

    OBS (GPTQ eq. 2): δ_F = −(w_j − ŵ_j)/[H_F⁻¹]_jj·[H_F⁻¹]_{:,j}, F the columns not yet fixed, j the first of
    them.
    """
    w = weight.double().clone()
    h = hessian.double()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        compressed = choose(j, w, inverse[0, 0])
        w[:, j:] -= ((w[:, j] - compressed) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = compressed
    return w


def loss(target: Tensor, compressed: Tensor, hessian: Tensor) -> float:
    """tr((W−Ŵ)H(W−Ŵ)ᵀ) in float64."""
    error = target.double() - compressed.double()
    return float(((error @ hessian.double()) * error).sum())
