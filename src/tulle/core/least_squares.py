"""Exact refit of the kept weights: for every output row, min over w with support in its mask of
(w*−w)·H·(w*−w)ᵀ.

The normal equations of row r are H_SS·w_S = (H·w*)_S, S its kept positions. One-shot updates such as
SparseGPT's approximate this solution, because one H⁻¹ serves all rows; here every row gets its own. Narrow
layers take a batched Cholesky factorisation, wide ones conjugate gradients, where two products per step serve all
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 512
"""Widest C_in for the factorisation, which costs C_out·C_in³/3; conjugate gradients cost 4·C_out·C_in² per
step.
"""

ROWS_ELEMENTS = 1 << 18
"""Elements of the rows that are solved together: what a step works on stays in cache."""

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
    """The refit by conjugate gradients, some hundred rows at a time.

    The preconditioner is H⁻¹ restricted to the mask: it is the inverse where all is kept, and at 50 % it takes a third
    of the steps that diag(H) takes, of twice the cost. Every step lowers every row's error, so that stopping early is
    safe. Stops when each row's residual, in the preconditioner's norm, has fallen to ``tolerance`` of its first value
    (1e-2 leaves about 1e-4 of the avoidable error), or after ``steps``.
    """
    lower, info = torch.linalg.cholesky_ex(hessian)
    inverse = torch.cholesky_inverse(lower) if int(info) == 0 else torch.diag(1 / hessian.diagonal())
    result = torch.empty_like(target)
    size = max(1, ROWS_ELEMENTS // target.shape[1])
    for first in range(0, target.shape[0], size):
        rows = slice(first, first + size)
        keep = mask[rows].to(target.dtype)
        begin = (target if start is None else start)[rows] * keep
        result[rows] = _conjugate_gradients(target[rows], keep, hessian, inverse, begin, steps, tolerance)
    return result


def _conjugate_gradients(
    target: Tensor, keep: Tensor, hessian: Tensor, inverse: Tensor, w: Tensor, steps: int, tolerance: float
) -> Tensor:
    """``refit_iterative`` of some rows from ``w``, which is changed in place."""
    residual = ((target - w) @ hessian).mul_(keep)
    direction = (residual @ inverse).mul_(keep)
    energy = (residual * direction).sum(1, keepdim=True)
    goal = tolerance**2 * energy
    for _ in range(steps):
        if bool((energy <= goal).all()):
            break
        product = (direction @ hessian).mul_(keep)
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0)  # a row that is solved stands still
        w.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        preconditioned = (residual @ inverse).mul_(keep)
        previous, energy = energy, (residual * preconditioned).sum(1, keepdim=True)
        direction = direction.mul_(torch.where(previous > 0, energy / previous, 0)).add_(preconditioned)
    return w
