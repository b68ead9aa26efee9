"""Hadamard matrices and their fast transform: x ↦ x·H/√b in consecutive blocks of b channels.

Orders: b = 2^k·m with m = 1 or the order of a Paley matrix (Paley 1933), m = q + 1 for a prime power q ≡ 3 mod 4
(type I, e.g. 344 = 7³ + 1) or m = 2(q + 1) for a prime power q ≡ 1 mod 4 (type II). Of several decompositions the one
with the smallest m is taken, and type I before type II. So H is defined by its order alone:

    H = H_m ⊗ S_(2^k), S₂ = [[1, 1], [1, −1]], S_(2n) = S₂ ⊗ S_n (Sylvester).

Channel c of a block is entry (c div 2^k, c mod 2^k) of a matrix X ``[m, 2^k]``, and x·H is H_mᵀ·X·S: butterflies over
runs of 2^k neighbours, then sums of m runs with signs. With field elements a_0 … a_(q−1) in the order of
paley.field, Q_ij = χ(a_i − a_j) (χ: 1 for squares, −1 for the others, 0 for 0), e = (1, …, 1) as a column:

    type I:  H_m = I + [[0, eᵀ], [−e, Q]]
    type II: H_m = [[0, eᵀ], [e, Q]] ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]]

S and type II are symmetric, type I is not: x·Hᵀ/√b is the inverse.

torch multiplies by H_m ⊗ S_(2^a) and S_(2^(k−a)), of nearly equal sizes, instead of butterflies. Milliseconds in
float32 on 2 busy cores of an AMD Zen 4, butterflies (one torch.stack per level) in brackets, medians of 5 each:

| tokens | 4096 | 5632 | 11008 |
|---|---|---|---|
| 1 | 0.06 (0.18) | 0.08 (0.18) | 0.15 (0.30) |
| 16 | 0.24 (0.70) | 0.39 (1.1) | 1.6 (2.9) |
| 256 | 3.4 (10) | 7.2 (13) | 27 (44) |
| 2048 | 61 (490) | 96 (460) | 290 (840) |
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tulle.core.paley import base_order, hadamard_block, paley
from tulle.errors import UserError

DENSE_UP_TO = 128
"""Blocks up to this size are one product with the whole matrix."""


@lru_cache(maxsize=64)
def hadamard_matrix(n: int) -> Tensor:
    """H ``[n, n]`` of ±1, int8, H·Hᵀ = n·I, as the module defines it; not to be written to.

    Raises ``UserError`` for an order that no construction here reaches.
    """
    base = base_order(n)
    if base is None:
        raise UserError(
            f"expected a Hadamard order 2^k·m with m = 1 or of Paley's, found {n}; "
            f"try blocks of {hadamard_block(max(n, 1))} channels"
        )
    return torch.kron(torch.from_numpy(paley(base)), _sylvester(n // base))


def is_hadamard_order(n: int) -> bool:
    """Whether :func:`hadamard_matrix` knows an H of this order."""
    return base_order(n) is not None


def hadamard_transform(x: Tensor, block: int, transpose: bool = False) -> Tensor:
    """x·diag(H, H, …)/√block, or with Hᵀ, for x ``[..., C]``, block a divisor of C; shape and dtype of x.

    Computes in float32, in float64 for float64. ``transpose=True`` undoes ``transpose=False``. Differentiable.
    """
    channels = x.shape[-1]
    if block < 1 or channels % block:
        raise UserError(
            f"expected a Hadamard block that divides {channels} channels, found {block}; try {hadamard_block(channels)}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left, right = _factors(block, dtype, transpose)
    work = x.to(dtype)
    if left is None:
        y = work.reshape(-1, block) @ right
    else:
        y = left @ (work.reshape(-1, right.shape[0]) @ right).reshape(-1, left.shape[0], right.shape[0])
    return y.reshape(x.shape).to(x.dtype)


@lru_cache(maxsize=64)
def _factors(block: int, dtype: torch.dtype, transpose: bool) -> tuple[Tensor | None, Tensor]:
    """L ``[P, P]`` (None when P = 1) and R ``[Q, Q]`` with x·H/√b = L·X·R for X ``[P, Q]``, P·Q = b."""
    if block <= DENSE_UP_TO:
        h = hadamard_matrix(block).to(dtype) / block**0.5
        return None, (h.T if transpose else h).contiguous()
    base = base_order(block)
    if base is None:
        hadamard_matrix(block)  # raises
        raise AssertionError
    right = 1
    while right * right < block and block // right % 2 == 0 and block // right // 2 >= base:
        right *= 2
    left = block // right
    h = hadamard_matrix(left).to(dtype) / left**0.5
    return (h if transpose else h.T).contiguous(), _sylvester(right).to(dtype) / right**0.5


def _sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.int8)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h
