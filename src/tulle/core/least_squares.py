"""Exact refit of the kept weights: for every output row, min over w with support in its mask of
(w*−w)·H·(w*−w)ᵀ.

The normal equations of row r are H_SS·w_S = (H·w*)_S, S its kept positions. One-shot updates such as
SparseGPT's approximate this solution, because one H⁻¹ serves all rows; here every row gets its own. Narrow
layers take a batched Cholesky factorisation, wide ones conjugate gradients, where one product W·H per step
serves all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 512
"""Widest C_in for the factorisation, which costs C_out·C_in³/3; conjugate gradients cost 2·C_out·C_in² per
step.
"""

CHUNK_ELEMENTS = 1 << 24
"""Elements of the stacked H_SS that are in memory at once."""


def refit(target: Tensor, mask: Tensor, hessian: Tensor, start: Tensor | None = None) -> Tensor:
    """Minimiser Ŵ of tr((W*−Ŵ)H(W*−Ŵ)ᵀ) among the matrices that are zero outside ``mask``.

    ``target`` W* ``[C_out, C_in]``, ``mask`` bool ``[C_out, C_in]``, ``hessian`` H ``[C_in, C_in]`` positive
    definite (damped). ``start`` is a first guess for the iterative solver (default W*⊙mask).
    """
    if target.shape[1] <= EXACT_UP_TO:
        return refit_exact(target, mask, hessian)
    return refit_iterative(target, mask, hessian, start)


def refit_exact(target: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The refit by one Cholesky factorisation per row, in float64."""
    h, keep = hessian.double(), mask.double()
    right = (target.double() @ h) * keep
    columns = h.shape[0]
    result = torch.empty_like(right)
    for rows in torch.arange(target.shape[0], device=target.device).split(max(1, CHUNK_ELEMENTS // columns**2)):
        k = keep[rows]
        # H_SS on the kept positions and the identity elsewhere, so that all rows have one size.
        system = h * k[:, :, None] * k[:, None, :] + torch.diag_embed(1 - k)
        result[rows] = torch.cholesky_solve(right[rows, :, None], torch.linalg.cholesky(system))[..., 0]
    return (result * keep).to(target.dtype)


def refit_iterative(
    target: Tensor,
    mask: Tensor,
    hessian: Tensor,
    start: Tensor | None = None,
    steps: int = 200,
    tolerance: float = 1e-2,
) -> Tensor:
    """The refit by conjugate gradients with diag(H) as preconditioner, all rows at once.

    Every step lowers every row's error, so that stopping early is safe. Stops when each row's residual has
    fallen to ``tolerance`` of its first value (1e-2 leaves about 1e-4 of the avoidable error), or after ``steps``.
    """
    keep = mask.to(target.dtype)
    inverse_diagonal = keep / hessian.diagonal()
    w = (target if start is None else start) * keep
    residual = ((target - w) @ hessian) * keep
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(1, keepdim=True)
    goal = tolerance**2 * energy
    for _ in range(steps):
        if bool((energy <= goal).all()):
            break
        product = (direction @ hessian) * keep
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0)  # a row that is solved stands still
        w += length * direction
        residual -= length * product
        preconditioned = residual * inverse_diagonal
        previous, energy = energy, (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + torch.where(previous > 0, energy / previous, 0) * direction
    return w
