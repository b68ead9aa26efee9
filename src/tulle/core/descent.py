"""Coordinate descent on the codes and steps of a quantised matrix, for the exact layer objective.

E(Ŵ) = tr((W−Ŵ)H(W−Ŵ)ᵀ) is a quadratic in every single code, so the best code of a column given all others is
the grid point nearest to ŵ_j + ((W−Ŵ)H)_j/H_jj. GPTQ fixes a code once and for all; sweeping again over all
columns, as QuantEase (Behdin et al. 2023, eq. 9) does, can only lower E. Between sweeps the step of each
group moves to its own least-squares optimum, rounded to bfloat16, which is the exact minimum over the steps
that the file can store. E never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core.grid import Quantised, code, to_bfloat16


def objective(weight: Tensor, compressed: Tensor, hessian: Tensor) -> Tensor:
    """E per row, ``[C_out]``: (w−ŵ)·H·(w−ŵ)ᵀ."""
    error = weight - compressed
    return ((error @ hessian) * error).sum(1)


def descend(
    weight: Tensor,
    quantised: Quantised,
    hessian: Tensor,
    mask: Tensor | None = None,
    sweeps: int = 4,
    block: int = 128,
) -> Quantised:
    """Improves a quantisation of W ``[C_out, C_in]`` under H ``[C_in, C_in]`` (damped, positive diagonal).

    Alternates a refit of the steps with a sweep over the codes, ``sweeps`` times; positions outside ``mask``
    stay zero. Returns new codes and steps; zero points stay.
    """
    grid = quantised.grid
    codes, scale, zero = quantised.codes.float(), quantised.scale.clone(), quantised.zero
    keep = torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
    for _ in range(sweeps):
        current = Quantised(grid, codes, scale, zero).dequantise(mask)
        gradient = (weight - current) @ hessian
        _refit_steps(codes, scale, zero, keep, gradient, hessian)
        changed = _sweep_codes(Quantised(grid, codes, scale, zero), keep, gradient, hessian, block)
        if not changed:
            break
    return Quantised(grid, codes.to(torch.int16), scale, zero)


def _refit_steps(codes: Tensor, scale: Tensor, zero: Tensor, keep: Tensor, gradient: Tensor, hessian: Tensor) -> None:
    """Moves each group's step in turn; updates ``scale`` and ``gradient`` = (W−Ŵ)H in place."""
    groups = scale.shape[1]
    width = codes.shape[1] // groups
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        c = (codes[:, columns] - zero[:, g, None]) * keep[:, columns]
        slope = (c * gradient[:, columns]).sum(1)
        curvature = ((c @ hessian[columns, columns]) * c).sum(1)
        best = to_bfloat16(scale[:, g] + torch.where(curvature > 0, slope / curvature, 0))
        move = best - scale[:, g]
        lower = move * (move * curvature - 2 * slope) < 0
        move = torch.where(lower, move, 0)
        scale[:, g] += move
        gradient.addmm_(c * move[:, None], hessian[columns], alpha=-1)


def _sweep_codes(q: Quantised, keep: Tensor, gradient: Tensor, hessian: Tensor, block: int) -> bool:
    """One pass over all codes; updates ``q.codes`` and ``gradient`` in place and says whether any code
    moved.
    """
    columns = q.codes.shape[1]
    width = columns // q.scale.shape[1]
    steps, zeros = q.scale.T.contiguous(), q.zero.T.contiguous()
    group = torch.arange(columns, device=steps.device) // width
    diagonal = hessian.diagonal()
    changed = False
    for start in range(0, columns, block):
        end = min(start + block, columns)
        # Columns first, so that a column is contiguous.
        codes, kept = q.codes[:, start:end].T.contiguous(), keep[:, start:end].T.contiguous()
        slope = gradient[:, start:end].T.contiguous()
        before = codes.clone()
        for i in range(end - start):
            j = start + i
            step, zero = steps[j // width], zeros[j // width]
            best = code((codes[i] - zero) * step + slope[i] / diagonal[j], step, zero, q.grid)
            move = (best - codes[i]) * step * kept[i]
            codes[i] = torch.where(kept[i] > 0, best, codes[i])
            slope.addr_(hessian[j, start:end], move, alpha=-1)
        if not torch.equal(codes, before):
            changed = True
            q.codes[:, start:end] = codes.T
            moves = (codes - before) * steps[group[start:end]]
            gradient.addmm_(moves.T, hessian[start:end], alpha=-1)
    return changed
