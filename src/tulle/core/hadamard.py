"""Hadamard matrices and their fast transform: x ↦ x·H/√b in consecutive blocks of b channels.

Orders: b = 2^k·m with m = 1 or the order of a Paley matrix (Paley 1933), m = q + 1 for a prime power q ≡ 3 mod 4
(type I, e.g. 344 = 7³ + 1) or m = 2(q + 1) for a prime power q ≡ 1 mod 4 (type II). Of several decompositions the one
with the smallest m is taken, and type I before type II. So H is defined by its order alone:

    H = H_m ⊗ S_(2^k), S₂ = [[1, 1], [1, −1]], S_(2n) = S₂ ⊗ S_n (Sylvester).

Channel c of a block is entry (c div 2^k, c mod 2^k) of a matrix X ``[m, 2^k]``, and x·H is H_mᵀ·X·S: butterflies over
runs of 2^k neighbours, then sums of m runs with signs. With field elements a_0 … a_(q−1) in the order of
:func:`field`, Q_ij = χ(a_i − a_j) (χ: 1 for squares, −1 for the others, 0 for 0), e = (1, …, 1) as a column:

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
from itertools import product
from math import isqrt

import torch
from torch import Tensor

from tulle.errors import UserError

LARGEST_BASE = 1024
"""Largest m that :func:`hadamard_block` takes: H_m costs m operations per channel, and a linear C_out."""

DENSE_UP_TO = 128
"""Blocks up to this size are one product with the whole matrix."""


@lru_cache(maxsize=64)
def hadamard_matrix(n: int) -> Tensor:
    """H ``[n, n]`` of ±1, int8, H·Hᵀ = n·I, as the module defines it; not to be written to.

    Raises ``UserError`` for an order that no construction here reaches.
    """
    base = _base(n)
    if base is None:
        raise UserError(
            f"expected a Hadamard order 2^k·m with m = 1 or of Paley's, found {n}; "
            f"try blocks of {hadamard_block(max(n, 1))} channels"
        )
    return torch.kron(_paley(base), _sylvester(n // base))


def is_hadamard_order(n: int) -> bool:
    """Whether :func:`hadamard_matrix` knows an H of this order."""
    return _base(n) is not None


@lru_cache
def hadamard_block(width: int) -> int:
    """Largest divisor of ``width`` that is a Hadamard order with m <= LARGEST_BASE; ``width`` itself where possible.

    Whole are for instance 384, 1536, 4864, 5632, 8960, 11008, 13824, 14336, 18944, 27648 (m = 12, 12, 76, 44, 140,
    344, 108, 28, 148, 108). An odd width gives 1, for which the transform does nothing.
    """
    if width < 1:
        raise UserError(f"expected a positive number of channels, found {width}; check the shape of the linear")
    divisors = {d for small in range(1, isqrt(width) + 1) if width % small == 0 for d in (small, width // small)}
    return max(d for d in divisors if (base := _base(d)) is not None and base <= LARGEST_BASE)


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
    base = _base(block)
    if base is None:
        hadamard_matrix(block)  # raises
        raise AssertionError
    right = 1
    while right * right < block and block // right % 2 == 0 and block // right // 2 >= base:
        right *= 2
    left = block // right
    h = hadamard_matrix(left).to(dtype) / left**0.5
    return (h if transpose else h.T).contiguous(), _sylvester(right).to(dtype) / right**0.5


@lru_cache
def _base(n: int) -> int | None:
    """The smallest m with n = 2^k·m, m = 1 or a Paley order."""
    if n < 1:
        return None
    odd, twos = n, 1
    while odd % 2 == 0:
        odd, twos = odd // 2, twos * 2
    if odd == 1:
        return 1
    bases = (odd * 2**k for k in range(2, twos.bit_length()))
    return next((m for m in bases if _paley_field(m) is not None), None)


def _paley_field(m: int) -> tuple[int, int, int] | None:
    """(type, p, exponent) of Paley's construction of order m, a multiple of 4."""
    for kind, q, residue in ((1, m - 1, 3), (2, m // 2 - 1, 1)):
        if q % 4 == residue and (power := _prime_power(q)) is not None:
            return kind, *power
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, p prime."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 else None


def _sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.int8)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@lru_cache
def _paley(m: int) -> Tensor:
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    found = _paley_field(m)
    assert found is not None
    kind, p, exponent = found
    q = p**exponent
    character, difference = field(p, exponent)
    frame = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    frame[0, 1:] = 1
    frame[1:, 0] = -1 if kind == 1 else 1
    frame[1:, 1:] = character[difference]
    eye = torch.eye(q + 1, dtype=torch.int8)
    if kind == 1:
        return eye + frame
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(frame, two) + torch.kron(eye, diagonal)


def field(p: int, exponent: int) -> tuple[Tensor, Tensor]:
    """Quadratic character χ (int8 ``[q]``) and a_i − a_j (int64 ``[q, q]``) of the field of q = p^e elements.

    Element number Σ d_i·p^i is the polynomial Σ d_i·z^i modulo the first irreducible z^e + Σ c_i·z^i, in the order of
    the numbers Σ c_i·p^i.
    """
    q = p**exponent
    modulus = _irreducible(p, exponent)
    digits = torch.tensor([[n // p**i % p for i in range(exponent)] for n in range(q)])
    powers = p ** torch.arange(exponent)
    # Squares of all elements: convolve the digits with themselves, then reduce from the highest power down.
    square = torch.zeros(q, 2 * exponent - 1, dtype=torch.int64)
    for i, j in product(range(exponent), repeat=2):
        square[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * exponent - 2, exponent - 1, -1):
        for i, c in enumerate(modulus):
            square[:, top - exponent + i] -= square[:, top] * c
        square %= p
    character = torch.full((q,), -1, dtype=torch.int8)
    character[(square[:, :exponent] % p) @ powers] = 1
    character[0] = 0
    return character, ((digits[:, None, :] - digits[None, :, :]) % p) @ powers


def _irreducible(p: int, degree: int) -> list[int]:
    """c_0 … c_(e−1) of the first monic z^e + Σ c_i·z^i that no monic polynomial of lower degree divides."""
    for reversed_low in product(range(p), repeat=degree):
        low = list(reversed_low[::-1])
        candidates = ([*divisor, 1] for d in range(1, degree // 2 + 1) for divisor in product(range(p), repeat=d))
        if not any(_divides(divisor, [*low, 1], p) for divisor in candidates):
            return low
    raise AssertionError(f"no irreducible polynomial of degree {degree} over {p} elements")


def _divides(divisor: list[int], polynomial: list[int], p: int) -> bool:
    """Whether a monic polynomial (lowest coefficient first) divides another modulo p."""
    rest, d = list(polynomial), len(divisor) - 1
    for top in range(len(rest) - 1, d - 1, -1):
        factor = rest[top]
        for i, c in enumerate(divisor):
            rest[top - d + i] = (rest[top - d + i] - factor * c) % p
    return not any(rest[:d])
