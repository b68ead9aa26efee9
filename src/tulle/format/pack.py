"""Bytes of a compressed linear: arrays -> the tensors that `LinearSpec.tensors` lists, and back.

docs/reference/format.md, section "Tensors of a linear", is the specification. NumPy has no bfloat16, so bfloat16
arrays are uint16 arrays of their bits here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tulle import native
from tulle.errors import UserError
from tulle.format.spec import LinearSpec, code_shape, parse_pattern

STORAGE = {"uint8": np.uint8, "bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
"""NumPy dtype that carries each stored dtype."""

LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the number that each code of a float format (E2M1) means: whole, for the kernels. Minus zero is zero."""


def _e4m3() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    size[(code & 127) == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


E4M3 = _e4m3()
"""The 256 numbers of float8 E4M3 (sign, 4 bits of exponent with bias 7, 3 of mantissa; no Inf, S1111111 is NaN).
Micikevicius et al. 2022, *FP8 formats for deep learning*."""
BYTE_SCALES = {
    "mxfp4": np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32),
    "nvfp4": np.where(np.arange(256) < 128, E4M3, np.float32(np.nan)),
}
"""What a byte of `scale` means, 256 numbers; NaN for one that is no scale. Of mxfp4 E8M0, 2^(byte − 127)."""


def bf16_to_f32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact: a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even. Overflow gives Inf; every NaN becomes a quiet NaN with its sign."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), quiet_nan, rounded)


def pack_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """bool [R, C] -> uint8 [R, ceil(C/8)], bit i of byte j for column 8j+i, padding bits 0."""
    return np.packbits(mask, axis=1, bitorder="little")


def unpack_mask(packed: NDArray[np.uint8], columns: int) -> NDArray[np.bool_]:
    """uint8 [R, ceil(C/8)] -> bool [R, C]."""
    return np.unpackbits(packed, axis=1, count=columns, bitorder="little").view(bool)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """codes [..., n] below 2^bits -> packed along the last axis, `code_shape(bits, codes.shape)`.

    Raises UserError on a larger code.
    """
    largest = int(codes.max(initial=0))
    if largest >= 1 << bits:
        raise UserError(f"expected codes below {1 << bits} for {bits} bits, found {largest}")
    if bits == 8:
        return np.ascontiguousarray(codes)
    if bits == 4:
        return native.pack_nibbles(np.atleast_2d(codes)).reshape(code_shape(4, codes.shape))
    planes = [np.packbits((codes >> b) & 1, axis=-1, bitorder="little") for b in range(bits)]
    return np.stack(planes, axis=-2)


def unpack_codes(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.uint8]:
    """Inverse of `pack_codes` for a last axis of n codes."""
    if bits == 8:
        return packed
    if bits == 4:
        codes = native.unpack_nibbles(np.atleast_2d(packed), n)
        return codes.reshape(*packed.shape[:-1], n)
    codes = np.zeros((*packed.shape[:-2], n), np.uint8)
    for b in range(bits):
        codes |= np.unpackbits(packed[..., b, :], axis=-1, count=n, bitorder="little") << b
    return codes


def pack_linear(
    spec: LinearSpec,
    values: NDArray,
    mask: NDArray[np.bool_] | None = None,
    scale: NDArray[np.uint16] | NDArray[np.uint8] | None = None,
    zero_point: NDArray[np.uint8] | None = None,
    row_scale: NDArray[np.uint16] | None = None,
    tensor_scale: NDArray[np.float32] | None = None,
) -> dict[str, NDArray]:
    """suffix -> array, exactly the tensors of `spec`.

    values [C_out, C_in]: codes u (uint8) of a quantised linear, else the weights as `values_dtype`.
    mask [C_out, C_in]: True = stored, the other values are ignored. scale [C_out, G]: bfloat16 bits, or uint8 where
    `scale_bits` is 8; then row_scale [C_out], bfloat16 bits. zero_point [C_out, G]: one each, not packed. tensor_scale
    [1]: of nvfp4. Raises UserError where an array does not fit the spec.
    """
    dtype = np.dtype(STORAGE[spec.values_dtype] if spec.values_dtype else np.uint8)
    _require("values", values, dtype, spec.shape)
    arrays: dict[str, NDArray] = {}
    if spec.sparse:
        _require("mask", mask, np.dtype(bool), spec.shape)
        assert mask is not None
        arrays["mask"] = pack_mask(mask)
        _check_mask(spec, mask)
        values = native.compress(arrays["mask"], values)
    elif mask is not None:
        raise UserError("expected a mask only for a sparse linear; set sparse: true or drop the mask")
    name = "values" if spec.sparse else "weight" if spec.bits is None else "codes"
    arrays[name] = np.ascontiguousarray(values) if spec.bits is None else pack_codes(values, spec.bits)
    if zero_point is not None and spec.bits is not None:
        _require("zero_point", zero_point, np.dtype(np.uint8), (spec.shape[0], spec.groups))
        zero_point = pack_codes(zero_point, spec.zero_point_bits or spec.bits)
    for suffix, array in (("scale", scale), ("row_scale", row_scale), ("zero_point", zero_point),
                          ("tensor_scale", tensor_scale)):  # fmt: skip
        if array is not None:
            arrays[suffix] = np.ascontiguousarray(array)
    check_tensors(spec, arrays)
    return arrays


def unpack_linear(spec: LinearSpec, tensors: Mapping[str, NDArray]) -> NDArray[np.float32]:
    """The dense weight [C_out, C_in] that the tensors mean: scale·(u − zero), scale times the float that u is, or the
    values; 0 where pruned.

    Raises UserError where a tensor does not fit the spec.
    """
    if spec.bits is None:
        check_tensors(spec, tensors)
        stored = tensors["values" if spec.sparse else "weight"]
        dense = native.expand(tensors["mask"], stored, spec.shape[1]) if spec.sparse else stored
        return bf16_to_f32(dense) if spec.values_dtype == "bfloat16" else dense.astype(np.float32)
    codes, mask = unpack_linear_codes(spec, tensors)
    c_out, c_in = spec.shape
    zero_point = unpack_zero_point(spec, tensors)
    grouped = (codes if spec.format == "int" else LEVELS[codes]).reshape(c_out, spec.groups, -1).astype(np.float32)
    if spec.format == "int":
        grouped -= np.float32(1 << (spec.bits - 1)) if zero_point is None else zero_point[:, :, None]
    grouped *= unpack_scale(spec, tensors)[:, :, None]
    weight = grouped.reshape(c_out, c_in)
    if mask is not None:
        weight[~mask] = 0.0
    return weight


def unpack_scale(spec: LinearSpec, tensors: Mapping[str, NDArray]) -> NDArray[np.float32]:
    """Scales [C_out, G] of a quantised linear; with `scale_bits` 8 scale·row_scale, which float32 holds exactly.

    Of a float format half of them, which belongs to `LEVELS`: numbers that bfloat16 holds, too.
    """
    if spec.format != "int":
        steps = BYTE_SCALES[spec.format][tensors["scale"]] * np.float32(0.5)
        return steps * tensors["tensor_scale"] if spec.format == "nvfp4" else steps
    if spec.scale_bits == 16:
        return bf16_to_f32(tensors["scale"])
    return tensors["scale"].astype(np.float32) * bf16_to_f32(tensors["row_scale"])[:, None]


def unpack_zero_point(spec: LinearSpec, tensors: Mapping[str, NDArray]) -> NDArray[np.uint8] | None:
    """Zero points [C_out, G] of a quantised linear; None where it is symmetric."""
    if spec.symmetric or spec.bits is None:
        return None
    return unpack_codes(tensors["zero_point"], spec.zero_point_bits or spec.bits, spec.groups)


def unpack_linear_codes(
    spec: LinearSpec, tensors: Mapping[str, NDArray]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """(codes u [C_out, C_in], 0 where pruned; mask [C_out, C_in] or None if dense) of a quantised linear.

    Raises UserError where a tensor does not fit the spec, or the spec is of an unquantised linear.
    """
    if spec.bits is None:
        raise UserError("expected a quantised linear, found one without bits; its values are weights")
    return unpack_stored(spec, tensors)


def unpack_stored(spec: LinearSpec, tensors: Mapping[str, NDArray]) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """(codes, or values as they are stored [C_out, C_in], 0 where pruned; mask [C_out, C_in] or None if dense).

    Raises UserError where a tensor does not fit the spec.
    """
    check_tensors(spec, tensors)
    c_in = spec.shape[1]
    if spec.bits is None:
        stored = tensors["values" if spec.sparse else "weight"]
    elif spec.sparse:
        stored = unpack_codes(tensors["values"], spec.bits, spec.stored)
    else:
        stored = unpack_codes(tensors["codes"], spec.bits, c_in)
    if not spec.sparse:
        return stored, None
    mask = unpack_mask(tensors["mask"], c_in)
    return native.expand(tensors["mask"], stored, c_in), mask


def check_tensors(spec: LinearSpec, tensors: Mapping[str, NDArray]) -> None:
    """Raises UserError unless names, dtypes, shapes, padding and counts fit and scales are finite."""
    expected = spec.tensors()
    if set(tensors) != set(expected):
        wanted, found = ", ".join(sorted(expected)), ", ".join(sorted(tensors))
        raise UserError(f"expected the tensors {wanted}, found {found or 'none'}")
    for suffix, (dtype, shape) in expected.items():
        _require(suffix, tensors[suffix], np.dtype(STORAGE[dtype]), shape)
    if spec.sparse:
        _check_padding("mask", tensors["mask"], spec.shape[1])
        _check_mask(spec, unpack_mask(tensors["mask"], spec.shape[1]))
    if spec.bits is None:
        return
    name, n = ("values", spec.stored) if spec.sparse else ("codes", spec.shape[1])
    _check_code_padding(name, tensors[name], n, spec.bits)
    if spec.format != "int":
        _check_byte_scales(spec, tensors)
        return
    floats = "scale" if spec.scale_bits == 16 else "row_scale"
    if not np.isfinite(bf16_to_f32(tensors[floats])).all():
        raise UserError(f"{floats}: expected finite numbers, found NaN or Inf; the file is damaged")
    zero_point = unpack_zero_point(spec, tensors)
    if zero_point is None:
        return
    _check_code_padding("zero_point", tensors["zero_point"], spec.groups, spec.zero_point_bits or spec.bits)
    largest = int(zero_point.max())
    if largest >= 1 << spec.bits:
        raise UserError(f"zero_point: expected values below {1 << spec.bits}, found {largest}")


def _check_byte_scales(spec: LinearSpec, tensors: Mapping[str, NDArray]) -> None:
    known = np.isfinite(BYTE_SCALES[spec.format])
    if not known[tensors["scale"]].all():
        raise UserError(f"scale: expected bytes up to {np.flatnonzero(known)[-1]}, found others; the file is damaged")
    if spec.format == "nvfp4":
        found = tensors["tensor_scale"][0]
        if not (2.0**-100 <= found <= 2.0**100 and np.frexp(found)[0] == 0.5):
            raise UserError(f"tensor_scale: expected a power of two from 2^-100 to 2^100, found {found}; damaged file")


def _require(name: str, array: NDArray | None, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array is None:
        raise UserError(f"{name}: expected {dtype} {list(shape)}, found nothing")
    if array.dtype != dtype or array.shape != shape:
        raise UserError(f"{name}: expected {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")


def _check_code_padding(name: str, packed: NDArray[np.uint8], n: int, bits: int) -> None:
    if bits != 8:
        _check_padding(name, packed, n, bits_per_code=4 if bits == 4 else 1)


def _check_padding(name: str, packed: NDArray[np.uint8], n: int, bits_per_code: int = 1) -> None:
    """The bits after the n-th code in the last byte of a row must be 0: equal weights are equal bytes."""
    used = n * bits_per_code % 8
    if used and (packed[..., -1] >> used).any():
        raise UserError(f"{name}: expected zero padding after {n} columns, found set bits; damaged file")


def _check_mask(spec: LinearSpec, mask: NDArray[np.bool_]) -> None:
    found = int(np.count_nonzero(mask))
    if found != spec.nonzeros:
        raise UserError(f"mask: expected {spec.nonzeros} set bits, found {found}")
    if spec.pattern is not None:
        n, m = parse_pattern(spec.pattern)
        most = int(mask.reshape(-1, m).sum(1).max())
        if most > n:
            raise UserError(f"mask: expected at most {n} set bits in every {m} columns, found {most}")
