"""Paley's Hadamard matrices, in NumPy: what the engine needs of :mod:`tulle.core.hadamard`, which defines them."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError

LARGEST_BASE = 1024
"""Largest m that :func:`hadamard_block` takes: H_m costs m operations per channel, and a linear C_out."""


@lru_cache
def hadamard_block(width: int) -> int:
    """Largest divisor of ``width`` that is a Hadamard order with m <= LARGEST_BASE; ``width`` itself where possible.

    Whole are for instance 384, 1536, 4864, 5632, 8960, 11008, 13824, 14336, 18944, 27648 (m = 12, 12, 76, 44, 140,
    344, 108, 28, 148, 108). An odd width gives 1, for which the transform does nothing.
    """
    if width < 1:
        raise UserError(f"expected a positive number of channels, found {width}; check the shape of the linear")
    divisors = {d for small in range(1, isqrt(width) + 1) if width % small == 0 for d in (small, width // small)}
    return max(d for d in divisors if (base := base_order(d)) is not None and base <= LARGEST_BASE)


@lru_cache
def base_order(n: int) -> int | None:
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


@lru_cache
def paley(m: int) -> NDArray[np.int8]:
    """H_m ``[m, m]`` of ±1 for a base order m; not to be written to."""
    if m == 1:
        return np.ones((1, 1), np.int8)
    found = _paley_field(m)
    assert found is not None
    kind, p, exponent = found
    q = p**exponent
    character, difference = field(p, exponent)
    frame = np.zeros((q + 1, q + 1), np.int8)
    frame[0, 1:] = 1
    frame[1:, 0] = -1 if kind == 1 else 1
    frame[1:, 1:] = character[difference]
    eye = np.eye(q + 1, dtype=np.int8)
    if kind == 1:
        return eye + frame
    two = np.array([[1, 1], [1, -1]], np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(frame, two) + np.kron(eye, diagonal)


def field(p: int, exponent: int) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Quadratic character χ (int8 ``[q]``) and a_i − a_j (int64 ``[q, q]``) of the field of q = p^e elements.

    Element number Σ d_i·p^i is the polynomial Σ d_i·z^i modulo the first irreducible z^e + Σ c_i·z^i, in the order of
    the numbers Σ c_i·p^i.
    """
    q = p**exponent
    modulus = _irreducible(p, exponent)
    digits = np.array([[n // p**i % p for i in range(exponent)] for n in range(q)], np.int64)
    powers = p ** np.arange(exponent)
    # Squares of all elements: convolve the digits with themselves, then reduce from the highest power down.
    square = np.zeros((q, 2 * exponent - 1), np.int64)
    for i, j in product(range(exponent), repeat=2):
        square[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * exponent - 2, exponent - 1, -1):
        for i, c in enumerate(modulus):
            square[:, top - exponent + i] -= square[:, top] * c
        square %= p
    character = np.full(q, -1, np.int8)
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
