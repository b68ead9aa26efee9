"""Better masks by 1-swaps: exchange one kept for one pruned position of a row while that lowers the row's error after
the refit.

For a row w* with kept positions S and pruned ones P, the refitted w has w_S = H_SS⁻¹·(w*H)_S, and r = (w* − w)·H is
zero on S. Optimal Brain Surgeon (Hassibi & Stork 1993) gives both halves of a swap: dropping i ∈ S costs
w_i²/[H_SS⁻¹]_ii, taking in j ∈ P gains r_j²/(H/S)_jj, H/S = H_PP − H_PS·H_SS⁻¹·H_SP. All that is needed stands in one
matrix per row, the *tableau*

    N = [  H_SS⁻¹         H_SS⁻¹·H_SP ]      u = [ w_S ]
        [ −H_PS·H_SS⁻¹    H/S         ],         [ r_P ],

and one pivot on the diagonal entry i moves i to the other set, in both directions by the same formula
N ← N − N_{:,i}·N_{i,:}/N_ii (row i: N_{i,:}/N_ii, column i: −N_{:,i}/N_ii, corner 1/N_ii), u likewise. With a = N_ii,
b = N_jj, c = N_ij, the error falls by exactly

    gain(i, j) = ((a·r_j + c·w_i)² / (a·b + c²) − w_i²) / a

when i leaves and j enters and every kept weight is fitted again. Each row takes its best swap until none is left.

A layer wider than ``WHOLE_UP_TO`` is treated in blocks of channels, the weights outside the block held fixed: the same
problem with H_BB and the right side (w·H + r)_B. What a block gains is then a lower bound of what the row gains. Blocks
are consecutive channels in one pass and channels far apart in the next, so that swaps reach everywhere. On masks of
scores this keeps most of the gain; to those of ADMM (prune.alps), which no block can improve, it adds nothing.

The same search for weights that are *not* refitted is SparseSwaps (Zimmer et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core.least_squares import refit
from tulle.core.masks import Pattern
from tulle.errors import UserError

WHOLE_UP_TO = 512
"""Widest C_in that is one block: 8·C_in² bytes and about 4·C_in³ operations per row, and 12·C_in² more per swap."""
WIDTH = 128
"""Channels of a block of a wider layer."""
CHUNK_ELEMENTS = 1 << 21
"""Elements of the tableaux that are in memory at once."""
TOLERANCE = 1e-5
"""A swap must gain this share of the row's error; smaller ones only cost time."""


def check_swaps(swaps: int, refitted: bool) -> None:
    """Raises ``UserError`` unless ``swaps`` is a count, and 0 where the kept weights are not refitted."""
    if swaps < 0:
        raise UserError(f"expected swaps >= 0, found {swaps}; 0 leaves the mask as it is")
    if swaps and not refitted:
        raise UserError(
            f"expected refit: true and no bits with swaps, found swaps={swaps}; a swap is judged by the refitted error"
        )


def swap(
    target: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    pattern: Pattern | None = None,
    allowed: Tensor | None = None,
    passes: int = 1,
    width: int | None = None,
) -> Tensor:
    """The mask after the swaps, bool ``[C_out, C_in]``; as many entries per row (per stripe with ``pattern``) stay.

    ``target`` W* and ``mask`` ``[C_out, C_in]``, ``hessian`` H ``[C_in, C_in]`` positive definite (damped). No position
    outside ``allowed`` enters. At most ``passes`` over all blocks of ``width`` channels (default: ``WIDTH``, or all
    channels of a narrow layer); fewer when nothing helps.
    """
    columns = target.shape[1]
    width = width or (columns if columns <= WHOLE_UP_TO else WIDTH)
    mask = mask.clone()
    candidates = torch.ones_like(mask) if allowed is None else allowed
    stripe = 0 if pattern is None else pattern.m
    for number in range(passes):
        weight = refit(target, mask, hessian)
        residual = (target - weight) @ hessian
        least = TOLERANCE * ((target - weight) * residual).sum(1).clamp_min(0)
        least += 1e-9 * ((target @ hessian) * target).sum(1)  # what rounding could pretend to gain
        before = mask.clone()
        for block in _blocks(columns, max(stripe, 1), width, spread=number % 2 == 1, device=target.device):
            new, kept = _swap_block(
                weight[:, block], residual[:, block], mask[:, block], candidates[:, block],
                hessian[block][:, block], stripe, least,
            )  # fmt: skip
            residual += (weight[:, block] - new) @ hessian[block]
            weight[:, block], mask[:, block] = new, kept
        if columns <= width or torch.equal(mask, before):
            break
    return mask


def _blocks(columns: int, unit: int, width: int, spread: bool, device: torch.device) -> list[Tensor]:
    """Channels of each block, in whole units (stripes): consecutive ones, or every k-th for ``spread``."""
    units = torch.arange(columns, device=device).reshape(-1, unit)
    count = -(-len(units) // max(width // unit, 1))
    return [(units[k::count] if spread else part).flatten() for k, part in enumerate(units.tensor_split(count))]


def _swap_block(
    weight: Tensor, residual: Tensor, mask: Tensor, candidates: Tensor, hessian: Tensor, stripe: int, least: Tensor
) -> tuple[Tensor, Tensor]:
    """Refitted weights and mask ``[C_out, B]`` of one block after its swaps, in float64 but for the result."""
    h = hessian.double()
    right = weight.double() @ h + residual.double()
    new, kept = torch.empty_like(weight), mask.clone()
    columns = h.shape[0]
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, CHUNK_ELEMENTS // columns**2)):
        n, u = tableau(h, right[rows], mask[rows])
        fitted = exchange(n, u, kept[rows], candidates[rows], stripe or columns, least[rows].double())
        kept[rows] = fitted[1]
        new[rows] = (fitted[0] * fitted[1]).to(weight.dtype)
    return new, kept


def tableau(hessian: Tensor, right: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """N ``[R, B, B]`` and u ``[R, B]`` of R rows for H ``[B, B]``, right sides w*H ``[R, B]`` and masks ``[R, B]``."""
    k = mask.to(hessian.dtype)
    both = k[:, :, None] * k[:, None, :]
    # H_SS on the kept positions and the identity elsewhere, so that all rows have one size.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian * both + torch.diag_embed(1 - k))) * both
    fitted = inverse @ hessian  # rows S: H_SS⁻¹·H_S:
    schur = hessian - hessian @ fitted
    row, column = mask[:, :, None], mask[:, None, :]
    n = torch.where(row, torch.where(column, inverse, fitted), torch.where(column, -fitted.mT, schur))
    w = (inverse @ right[:, :, None])[..., 0]
    return n, torch.where(mask, w, right - w @ hessian)


def pivot(n: Tensor, u: Tensor, index: Tensor) -> None:
    """Moves position ``index`` ``[R]`` of each row to the other set, in place."""
    rows = torch.arange(len(index), device=index.device)
    row, column = n[rows, index], n[rows, :, index]
    corner = row.gather(1, index[:, None])
    row = row / corner
    value = u.gather(1, index[:, None]) / corner
    n.baddbmm_(column[:, :, None], row[:, None, :], alpha=-1)
    u.addcmul_(column, value, value=-1)
    n[rows, index] = row
    n[rows, :, index] = -column / corner
    n[rows, index, index] = 1 / corner[:, 0]
    u.scatter_(1, index[:, None], value)


def gains(n: Tensor, u: Tensor, kept: Tensor, candidates: Tensor, stripe: int) -> Tensor:
    """Fall of the error ``[R, M, M, B/M]`` when kept i leaves and pruned j enters (axes 1 and 2, places in a stripe of
    ``stripe`` = M channels, axis 3); at most 0 where that is no swap.
    """
    groups = n.shape[1] // stripe

    def places(values: Tensor) -> Tensor:
        return values.reshape(-1, groups, stripe).mT

    c = n.reshape(-1, groups, stripe, groups, stripe).diagonal(dim1=1, dim2=3)
    diagonal = n.diagonal(dim1=1, dim2=2)
    inside, outside = places(kept)[:, :, None], places(candidates & ~kept)[:, None]
    # An i that is not kept gets w = 0 and 1/a = 0, a j that may not enter b = ∞.
    w = torch.where(inside, places(u)[:, :, None], 0.0)
    a = torch.where(inside, places(diagonal)[:, :, None], 1.0)
    r = torch.where(outside, places(u)[:, None], 0.0)
    b = torch.where(outside, places(diagonal)[:, None], torch.inf)
    gain = (c * w).addcmul_(a, r).square_()
    gain /= (c * c).addcmul_(a, b)
    return gain.sub_(w.square()).mul_(torch.where(inside, 1 / a, 0.0))


def exchange(
    n: Tensor, u: Tensor, kept: Tensor, candidates: Tensor, stripe: int, least: Tensor
) -> tuple[Tensor, Tensor]:
    """u and the mask ``[R, B]`` after every row's best swaps, as long as one gains more than ``least`` ``[R]``."""
    groups = n.shape[1] // stripe
    final, mask = u.clone(), kept.clone()
    rows = torch.arange(len(u), device=u.device)
    while len(rows):
        gain, place = gains(n, u, kept, candidates, stripe).flatten(1).max(1)
        going = gain > least
        if not bool(going.all()):
            final[rows[~going]], mask[rows[~going]] = u[~going], kept[~going]
            n, u, kept, candidates = n[going], u[going], kept[going], candidates[going]
            rows, least, place = rows[going], least[going], place[going]
        group = place % groups * stripe
        out, into = group + place // groups // stripe, group + place // groups % stripe
        pivot(n, u, out)
        pivot(n, u, into)
        kept = kept.scatter(1, out[:, None], False).scatter(1, into[:, None], True)
    return final, mask
