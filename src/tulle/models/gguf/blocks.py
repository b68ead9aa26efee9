"""GGUF's block formats: the codes, scales and minima that a row's blocks hold, exactly.

Every quantised type is, value for value,

    weight = scale · (code − zero) + minimum

with one scale (and minimum) per group of 16, 32 or 256 inputs. Scales are stored in half precision; in the K-quants
and IQ4_XS a group's scale is a product, d·s with |s| ≤ 128, which float32 holds exactly. IQ4_NL, IQ4_XS and MXFP4
choose from 16 whole numbers that are no even grid: their codes are those numbers, in 8 bits (MXFP4: 5).

The layouts of the blocks are those of ggml (ggml-common.h); ``gguf.quants.dequantize`` is the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from tulle.errors import UserError

Type = GGMLQuantizationType
Bytes = NDArray[Any]
"""Of uint8; NumPy's stubs take shifts and masks of it for other integers."""

FLOATS = (Type.F32, Type.F16, Type.BF16, Type.F64)

IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)  # fmt: skip
"""What a code of IQ4_NL and IQ4_XS stands for."""
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)
"""Twice what a code of MXFP4 (e2m1) stands for."""


@dataclass(frozen=True)
class Coded:
    """Quantised rows: weight = scale · (code − zero) + minimum."""

    codes: Bytes
    """``[R, C]``"""
    bits: int
    """Of the codes; types that choose from 16 whole numbers have 8, or 5."""
    zero: int
    scale: NDArray[Any]
    """``[R, G]``, float16 or float32."""
    minimum: NDArray[Any] | None = None
    """``[R, G]``, of the scale's dtype."""

    def floats(self) -> NDArray[np.float32]:
        """``[R, C]`` in float32, rounded once."""
        rows, columns = self.codes.shape
        grouped = self.codes.reshape(rows, self.scale.shape[1], -1).astype(np.float32) - np.float32(self.zero)
        grouped *= self.scale.astype(np.float32)[:, :, None]
        if self.minimum is not None:
            grouped += self.minimum.astype(np.float32)[:, :, None]
        return grouped.reshape(rows, columns)

    def rows(self, order: NDArray[np.int64]) -> Coded:
        """In another order of the rows."""
        minimum = None if self.minimum is None else self.minimum[order]
        return Coded(self.codes[order], self.bits, self.zero, self.scale[order], minimum)

    def columns(self, order: NDArray[np.int64]) -> Coded:
        """In another order of the columns. Raises ``UserError`` where it would part those that share a scale."""
        width = self.codes.shape[1] // self.scale.shape[1]
        first = order[::width]
        if (first % width).any() or not np.array_equal(order, (first[:, None] + np.arange(width)).reshape(-1)):
            raise UserError(f"expected columns that move in whole blocks of {width}, found others; convert it again")
        groups = first // width
        minimum = None if self.minimum is None else self.minimum[:, groups]
        return Coded(self.codes[:, order], self.bits, self.zero, self.scale[:, groups], minimum)


def decode(raw: Bytes, kind: GGMLQuantizationType) -> Coded:
    """What ``raw [R, bytes of a row]`` of a quantised type holds. Raises ``UserError`` for a type that is not known."""
    if kind not in READERS:
        raise refused(kind)
    size = GGML_QUANT_SIZES[kind][1]
    return READERS[kind](np.ascontiguousarray(raw).reshape(len(raw), -1, size))


def stored_floats(raw: Bytes, kind: GGMLQuantizationType) -> NDArray[Any]:
    """``raw`` of a float type: float32, float16, float64, or bits of bfloat16 (uint16)."""
    dtypes = {Type.F32: np.float32, Type.F16: np.float16, Type.F64: np.float64, Type.BF16: np.uint16}
    return np.ascontiguousarray(raw).view(dtypes[kind])


def to_float32(raw: Bytes, kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Any type in float32: exact for all but F64 and types with minima, whose sums are rounded once."""
    if kind in READERS:
        return decode(raw.reshape(-1, raw.shape[-1]), kind).floats().reshape(*raw.shape[:-1], -1)
    if kind not in FLOATS:
        raise refused(kind)
    found = stored_floats(raw, kind)
    if kind is Type.BF16:
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float32)


def refused(kind: GGMLQuantizationType) -> UserError:
    known = ", ".join(t.name for t in (*FLOATS, *READERS))
    return UserError(
        f"expected tensors of a type in {known}, found {kind.name}; requantise the file with one of these, or give the "
        "unquantised model"
    )


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """``[R, blocks]`` half-precision numbers at a byte of every block."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[:, :, 0]


def _row(parts: Bytes) -> Bytes:
    """``[R, blocks, …]`` → ``[R, C]``."""
    return np.ascontiguousarray(parts).reshape(len(parts), -1)


def _nibbles(packed: Bytes) -> Bytes:
    """``[R, blocks, chunks, n]`` bytes → ``[R, blocks, chunks, 2n]``: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _nibbles32(blocks: Bytes, at: int) -> Bytes:
    """The 32 codes of a block of 16 bytes from ``at`` on."""
    return _nibbles(blocks[:, :, at : at + 16])


def _bits32(blocks: Bytes, at: int) -> Bytes:
    """32 single bits from four bytes, each as a fifth bit."""
    return np.unpackbits(blocks[:, :, at : at + 4], axis=-1, bitorder="little") << 4


def _q4_0(b: Bytes) -> Coded:
    return Coded(_row(_nibbles32(b, 2)), 4, 8, _half(b, 0))


def _q4_1(b: Bytes) -> Coded:
    return Coded(_row(_nibbles32(b, 4)), 4, 0, _half(b, 0), _half(b, 2))


def _q5_0(b: Bytes) -> Coded:
    return Coded(_row(_nibbles32(b, 6) | _bits32(b, 2)), 5, 16, _half(b, 0))


def _q5_1(b: Bytes) -> Coded:
    return Coded(_row(_nibbles32(b, 8) | _bits32(b, 4)), 5, 0, _half(b, 0), _half(b, 2))


def _q8_0(b: Bytes) -> Coded:
    return Coded(_row(b[:, :, 2:] ^ 0x80), 8, 128, _half(b, 0))


def _products(d: NDArray[np.float16], factors: NDArray[Any]) -> NDArray[np.float32]:
    """d ``[R, blocks]`` times whole numbers ``[R, blocks, groups]``: at most 18 bits, exact in float32."""
    return (d.astype(np.float32)[:, :, None] * factors.astype(np.float32)).reshape(len(d), -1)


def _quarters(packed: Bytes) -> Bytes:
    """``[…, 32·n]`` bytes of four 2-bit numbers → ``[…, n, 4, 32]``: of 32 bytes first the lowest numbers."""
    chunks = packed.reshape(*packed.shape[:-1], -1, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (chunks >> shifts) & 3


def _q2_k(b: Bytes) -> Coded:
    scales, d, least = b[:, :, :16], _half(b, 80), _half(b, 82)
    codes = _row(_quarters(b[:, :, 16:80]))
    return Coded(codes, 2, 0, _products(d, scales & 15), -_products(least, scales >> 4))


def _q3_k(b: Bytes) -> Coded:
    high = _planes(b[:, :, :32])
    codes = _quarters(b[:, :, 32:96]).reshape(*b.shape[:2], 8, 32) | high << 2
    packed = b[:, :, 96:108]
    low = _nibbles(packed[:, :, :8])
    upper = (packed[:, :, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = (low | upper.reshape(*b.shape[:2], 16) << 4).astype(np.int16) - 32
    return Coded(_row(codes), 3, 4, _products(_half(b, 108), scales))


def _planes(packed: Bytes) -> Bytes:
    """``[R, blocks, 32]`` → ``[R, blocks, 8, 32]``: bit i of every byte."""
    return (packed[:, :, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1


def _scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes → eight scales and eight minima of 6 bits each (Q4_K, Q5_K)."""
    first, second, third = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minima


def _q4_k(b: Bytes) -> Coded:
    scales, minima = _scales_and_minima(b[:, :, 4:16])
    codes = _row(_nibbles(b[:, :, 16:].reshape(*b.shape[:2], 4, 32)))
    return Coded(codes, 4, 0, _products(_half(b, 0), scales), -_products(_half(b, 2), minima))


def _q5_k(b: Bytes) -> Coded:
    scales, minima = _scales_and_minima(b[:, :, 4:16])
    codes = _nibbles(b[:, :, 48:].reshape(*b.shape[:2], 4, 32)).reshape(*b.shape[:2], 8, 32)
    return Coded(
        _row(codes | _planes(b[:, :, 16:48]) << 4),
        5,
        0,
        _products(_half(b, 0), scales),
        -_products(_half(b, 2), minima),
    )


def _q6_k(b: Bytes) -> Coded:
    low = b[:, :, :128].reshape(*b.shape[:2], 2, 1, 2, 32)
    low = np.concatenate([low & 15, low >> 4], axis=3).reshape(*b.shape[:2], 2, 4, 32)
    codes = low | _quarters(b[:, :, 128:192]) << 4
    scales = b[:, :, 192:208].view(np.int8)
    return Coded(_row(codes), 6, 32, _products(_half(b, 208), scales))


def _whole(values: NDArray[np.int16], codes: Bytes) -> Bytes:
    """Codes of 8 bits with zero point 128 for what 4-bit codes stand for."""
    return (values + 128).astype(np.uint8)[codes]


def _iq4_nl(b: Bytes) -> Coded:
    return Coded(_whole(IQ4_VALUES, _row(_nibbles32(b, 2))), 8, 128, _half(b, 0))


def _iq4_xs(b: Bytes) -> Coded:
    high = np.ascontiguousarray(b[:, :, 2:4]).view(np.uint16)
    upper = (high >> (2 * np.arange(8, dtype=np.uint16))) & 3
    lower = np.stack([b[:, :, 4:8] & 15, b[:, :, 4:8] >> 4], axis=-1).reshape(*b.shape[:2], 8)
    scales = (lower | upper << 4).astype(np.int16) - 32
    codes = _row(_nibbles(b[:, :, 8:].reshape(*b.shape[:2], 8, 16)))
    return Coded(_whole(IQ4_VALUES, codes), 8, 128, _products(_half(b, 0), scales))


def _mxfp4(b: Bytes) -> Coded:
    # Half of 2^(e − 127), since the values are doubled; they go from −12 to 12.
    scale = np.ldexp(np.float32(1), b[:, :, 0].astype(np.int32) - 128)
    return Coded((MXFP4_VALUES + 12).astype(np.uint8)[_row(_nibbles32(b, 1))], 5, 12, scale)


def _trits(packed: Bytes, count: int) -> Bytes:
    """``[R, blocks, n]`` bytes of ``count`` base-3 digits, the first being the most significant of a fraction of 256 →
    ``[R, blocks, count, n]``."""
    powers = 3 ** np.arange(count, dtype=np.uint8)[:, None]
    digits = packed[:, :, None, :] * powers.astype(np.uint8)
    return ((digits.astype(np.uint16) * 3) >> 8).astype(np.uint8)


def _tq1_0(b: Bytes) -> Coded:
    parts = [_trits(b[:, :, :32], 5), _trits(b[:, :, 32:48], 5), _trits(b[:, :, 48:52], 4)]
    codes = np.concatenate([part.reshape(*b.shape[:2], -1) for part in parts], axis=-1)
    return Coded(_row(codes), 2, 1, _half(b, 52))


def _tq2_0(b: Bytes) -> Coded:
    return Coded(_row(_quarters(b[:, :, :64])), 2, 1, _half(b, 64))


def bits_of(kind: GGMLQuantizationType) -> int:
    """Of a quantised type's codes."""
    return decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind).bits


READERS: dict[GGMLQuantizationType, Callable[[Bytes], Coded]] = {
    Type.Q4_0: _q4_0, Type.Q4_1: _q4_1, Type.Q5_0: _q5_0, Type.Q5_1: _q5_1, Type.Q8_0: _q8_0,
    Type.Q2_K: _q2_k, Type.Q3_K: _q3_k, Type.Q4_K: _q4_k, Type.Q5_K: _q5_k, Type.Q6_K: _q6_k,
    Type.IQ4_NL: _iq4_nl, Type.IQ4_XS: _iq4_xs, Type.MXFP4: _mxfp4, Type.TQ1_0: _tq1_0, Type.TQ2_0: _tq2_0,
}  # fmt: skip
"""How each quantised type is read."""


def encode(codes: NDArray[np.int16], scale: NDArray[np.float16], kind: GGMLQuantizationType) -> Bytes:
    """Rows of scale · code as a type's bytes ``[R, bytes of a row]``, exactly: the inverse of :func:`decode`.

    ``codes`` ``[R, C]``: whole numbers in the type's range (:data:`RANGES`), C a multiple of its block. ``scale``
    ``[R, blocks]``.
    """
    rows, block = len(codes), GGML_QUANT_SIZES[kind][0]
    least, _ = RANGES[kind]
    unsigned = (codes - least).astype(np.uint8).reshape(rows, -1, block)
    d = np.ascontiguousarray(scale).reshape(rows, -1, 1).view(np.uint8)
    if kind is Type.Q8_0:
        parts = [d, unsigned ^ 0x80]
    elif kind is Type.TQ2_0:
        quarters = unsigned.reshape(rows, -1, 2, 4, 32)
        packed = np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=3)
        parts = [packed.reshape(rows, -1, 64), d]
    elif kind is Type.Q5_0:
        parts = [d, np.packbits(unsigned >> 4, axis=-1, bitorder="little"), _packed_nibbles(unsigned & 15)]
    else:
        parts = [d, _packed_nibbles(unsigned)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def encode_q4_1(codes: Bytes, scale: NDArray[np.float16], minimum: NDArray[np.float16]) -> Bytes:
    """Rows of scale · code + minimum, codes ``[R, C]`` from 0 to 15, scale and minimum ``[R, C/32]``."""
    rows = len(codes)
    numbers = [np.ascontiguousarray(part).reshape(rows, -1, 1).view(np.uint8) for part in (scale, minimum)]
    return np.concatenate([*numbers, _packed_nibbles(codes.reshape(rows, -1, 32))], axis=-1).reshape(rows, -1)


def encode_mxfp4(codes: Bytes, scale: Bytes) -> Bytes:
    """Rows of E2M1 codes ``[R, C]`` with E8M0 bytes ``[R, C/32]``: a block is its scale, then its codes."""
    rows = len(codes)
    parts = [scale.reshape(rows, -1, 1), _packed_nibbles(codes.reshape(rows, -1, 32))]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _packed_nibbles(codes: Bytes) -> Bytes:
    """``[R, blocks, 32]`` → ``[R, blocks, 16]``."""
    return codes[:, :, :16] | codes[:, :, 16:] << 4


RANGES = {Type.TQ2_0: (-1, 2), Type.Q4_0: (-8, 7), Type.Q5_0: (-16, 15), Type.Q8_0: (-128, 127)}
"""Whole numbers that types without minima hold, the smallest type first."""
