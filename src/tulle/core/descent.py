"""Coordinate descent on the codes and steps of a quantised matrix, for the exact layer objective.

E(Ŵ) = tr((W−Ŵ)H(W−Ŵ)ᵀ) is a quadratic in every single code, so the best code of a column given all others is
the grid point nearest to ŵ_j + ((W−Ŵ)H)_j/H_jj. GPTQ fixes a code once and for all; sweeping again over all
columns, as QuantEase (Behdin et al. 2023, eq. 9) does, can only lower E. Before its codes, the step of each
group moves to its own least-squares optimum, rounded to what the file can store, which is the exact minimum over
such steps. E never rises.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tulle.core import compiled
from tulle.core.grid import Grid, Quantised, code, storable_step


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

    Every sweep visits the groups in turn: first the step, then the codes. Positions outside ``mask`` stay zero. Returns
    new codes and steps; zero points stay. Groups wider than ``block`` columns move all steps of a sweep before its
    codes. On the CPU (core.compiled) it costs 4·C_out·C_in² operations and little more per sweep; grids of floats have
    no kernels and run in torch's operations.
    """
    columns = weight.shape[1]
    width = columns // quantised.scale.shape[1]
    if compiled.fits(weight, hessian, mask, quantised.scale, quantised.zero, grid=quantised.grid):
        codes, scale = quantised.codes.clone(), quantised.scale.clone()
        compiled.descend(
            weight, codes, scale, quantised.zero, quantised.grid, hessian, mask, sweeps, steps_first=width > block,
            row_scale=quantised.row_scale,
        )  # fmt: skip
        return Quantised(quantised.grid, codes, scale, quantised.zero, quantised.row_scale)
    return descend_plain(weight, quantised, hessian, mask, sweeps, block)


def descend_plain(
    weight: Tensor, quantised: Quantised, hessian: Tensor, mask: Tensor | None, sweeps: int, block: int
) -> Quantised:
    """``descend`` in torch's operations: its definition, and what runs on other devices.

    Costs 2·C_out·C_in² operations per sweep, twice that where a group is wider than ``block`` columns.
    """
    q = replace(quantised, codes=quantised.codes.float(), scale=quantised.scale.clone())
    columns = weight.shape[1]
    width = columns // q.scale.shape[1]
    gradient = (weight - q.dequantise(mask)) @ hessian
    keep = torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
    narrow = width <= block
    if narrow:
        block = block // width * width  # whole groups
    for _ in range(sweeps):
        codes, scale = q.codes.clone(), q.scale.clone()
        if not narrow:
            _refit_steps(q, keep, gradient, hessian)
        for start in range(0, columns, block):
            _sweep_block(q, keep, gradient, hessian, start, min(start + block, columns), narrow)
        if torch.equal(q.codes, codes) and torch.equal(q.scale, scale):
            break
    return replace(q, codes=q.codes.to(torch.int16))


def _best_step(step: Tensor, slope: Tensor, curvature: Tensor, row_scale: Tensor | None, grid: Grid) -> Tensor:
    """The step ``[C_out]`` for which curvature·m² − 2·slope·m, m its move, is least among those that can be stored."""
    wanted = step + torch.where(curvature > 0, slope / curvature, 0)
    wanted = storable_step(wanted, row_scale, grid)
    move = wanted - step
    return torch.where(move * (move * curvature - 2 * slope) < 0, wanted, step)


def _refit_steps(q: Quantised, keep: Tensor, gradient: Tensor, hessian: Tensor) -> None:
    """Moves each group's step in turn; updates ``q.scale`` and ``gradient`` = (W−Ŵ)H in place."""
    groups = q.scale.shape[1]
    width = q.codes.shape[1] // groups
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        c = (q.codes[:, part] - q.zero[:, g, None]) * keep[:, part]
        product = c @ hessian[part]
        slope, curvature = (c * gradient[:, part]).sum(1), (c * product[:, part]).sum(1)
        step = _best_step(q.scale[:, g], slope, curvature, q.row_scale, q.grid)
        gradient -= (step - q.scale[:, g])[:, None] * product
        q.scale[:, g] = step


def _sweep_block(
    q: Quantised, keep: Tensor, gradient: Tensor, hessian: Tensor, start: int, end: int, refit_steps: bool
) -> None:
    """One pass over the codes (and steps) of some columns; updates ``q`` and ``gradient`` in place."""
    width = q.codes.shape[1] // q.scale.shape[1]
    h = hessian[start:end, start:end]
    # Columns first, so that a column is contiguous. A copy in any case: one row is contiguous as it stands.
    codes, kept, slope = (
        t[:, start:end].T.clone(memory_format=torch.contiguous_format) for t in (q.codes, keep, gradient)
    )
    group = torch.arange(start, end, device=codes.device) // width
    steps, zeros = q.scale.T[group].contiguous(), q.zero.T[group].contiguous()
    before = (codes - zeros) * steps * kept
    for i in range(end - start):
        if refit_steps and i % width == 0:
            part = slice(i, i + width)
            c = (codes[part] - zeros[part]) * kept[part]
            curvature = (c * (h[part, part] @ c)).sum(0)
            step = _best_step(steps[i], (c * slope[part]).sum(0), curvature, q.row_scale, q.grid)
            slope -= (h[:, part] @ c) * (step - steps[i])
            steps[part] = step
        target = (codes[i] - zeros[i]) * steps[i] + slope[i] / h[i, i]
        best = code(target, steps[i], zeros[i], q.grid)
        slope.addr_(h[i], (best - codes[i]) * steps[i] * kept[i], alpha=-1)
        codes[i] = torch.where(kept[i] > 0, best, codes[i])
    moved = (codes - zeros) * steps * kept - before
    q.codes[:, start:end] = codes.T
    if refit_steps:
        q.scale[:, start // width : end // width] = steps[::width].T
    gradient.addmm_(moved.T, hessian[start:end], alpha=-1)
