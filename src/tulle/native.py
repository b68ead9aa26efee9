"""The compiled kernels, as functions on NumPy arrays.

The kernels are compiled for several instruction sets; the widest that this CPU executes is chosen at run
time. `TULLE_ISA=scalar|avx2|avx512|amx` forces one. All sets give the same bytes.

Arrays of codes and values are C-contiguous; other layouts are copied first. Bit and nibble order are those of
docs/reference/format.md: little-endian within a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.errors import UserError

cpu_features = _native.cpu_features
supported_isas = _native.supported_isas

try:
    isa = _native.active_isa()
except ValueError as error:
    raise UserError(str(error)) from None

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def pack_nibbles(codes: Bytes) -> Bytes:
    """codes [R, n] below 16 -> [R, ceil(n/2)]: two per byte, low nibble first, a missing last code is 0.

    Raises ValueError if a code is above 15.
    """
    return _native.pack_nibbles(np.ascontiguousarray(codes))


def unpack_nibbles(packed: Bytes, n: int) -> Bytes:
    """packed [R, ceil(n/2)] -> codes [R, n]. Raises ValueError if the width of a row does not fit n."""
    return _native.unpack_nibbles(np.ascontiguousarray(packed), n)


def count_mask(mask: Bytes, columns: int) -> int:
    """Set bits of mask [R, ceil(columns/8)], padding bits not counted. Raises ValueError on another width."""
    return _native.count_mask(np.ascontiguousarray(mask), columns)


def expand(mask: Bytes, values: NDArray, columns: int) -> NDArray:
    """Scatters values [nnz] (1, 2 or 4 bytes each) over the set bits of mask [R, ceil(columns/8)], row-major.

    Returns [R, columns] of the same dtype, zero where the bit is clear. Raises ValueError if the number of
    values is not the number of set bits.
    """
    return _native.expand(np.ascontiguousarray(mask), _bits(values), columns).view(values.dtype)


def compress(mask: Bytes, dense: NDArray) -> NDArray:
    """Inverse of `expand`: the elements of dense [R, C] where mask [R, ceil(C/8)] is set, row-major.

    Raises ValueError if the shapes do not fit each other.
    """
    return _native.compress(np.ascontiguousarray(mask), _bits(dense)).view(dense.dtype)


def anneal(
    scores: NDArray[np.uint8] | NDArray[np.int16],
    kept: int,
    m: int,
    *,
    proposals: int,
    start: float,
    end: float,
    seed: int = 0,
    threads: int = 1,
) -> tuple[NDArray[np.int64], int]:
    """Order of the columns of scores [R, C] that retains the most under kept:m, by simulated annealing over swaps.

    Returns (index [C], gain): stripe s holds the columns index[s·m : (s+1)·m], and retains in sum over all stripes
    ``gain`` more than in the order they came in. Scores are >= 0 (int16: all of them). ``start`` and ``end``:
    temperatures in units of the root mean square gain of a random swap. The result depends on the seed, not on the
    threads or the instruction set. Raises ValueError unless 1 <= kept < m <= 32 and m divides C.
    """
    rows, columns = scores.shape
    stride = -(-max(rows, 1) // 64) * 64
    raw = np.zeros(columns * stride * scores.itemsize + 64, np.uint8)
    aligned = raw[-raw.ctypes.data % 64 :][: columns * stride * scores.itemsize]
    by_column = aligned.view(scores.dtype).reshape(columns, stride)
    by_column[:, :rows] = scores.T
    index, gain = _native.anneal(by_column, list(range(columns)), kept, m, proposals, start, end, seed, threads)
    return np.array(index, np.int64), gain


def keep_largest(scores: Floats, keep: int, threads: int = 1) -> NDArray[np.bool_]:
    """Mask of the ``keep`` largest of every row of scores [R, C], none of them below 0; ties go to the lower index.

    Raises ValueError if ``keep`` is below 1.
    """
    mask = np.empty(scores.shape, np.bool_)
    _native.keep_largest(np.ascontiguousarray(scores), keep, mask, threads)
    return mask


class SparsePattern:
    """A held mask [R, C], bool, True = kept, laid out for products with a weight W that is zero elsewhere.

    ``entries`` [kept], int64: row · C + column of every value, in the order of all arrays of values. Results are the
    same bytes on every instruction set and for any number of threads (native/include/tulle/sparse_train.hpp defines
    them). Arrays are float32; others than C-contiguous ones are copied first. All methods raise ValueError if shapes do
    not fit the mask, and TypeError on other dtypes. Immutable; copies share it.
    """

    def __init__(self, mask: NDArray[np.bool_]):
        self._pattern = _native.SparsePattern(np.ascontiguousarray(mask))
        self.shape = (self._pattern.rows, self._pattern.columns)
        self.kept = self._pattern.kept
        self.bytes = self._pattern.bytes
        self.entries = self._pattern.entries()

    def __deepcopy__(self, memo: object) -> SparsePattern:
        return self

    def __reduce__(self) -> tuple[type[SparsePattern], tuple[NDArray[np.bool_]]]:
        mask = np.zeros(self.shape, np.bool_)
        mask.reshape(-1)[self.entries] = True
        return SparsePattern, (mask,)

    def product(self, values: Floats, x: Floats, bias: Floats | None = None, threads: int = 1) -> Floats:
        """x [T, C] -> y [T, R] = x·Wᵀ + bias."""
        y = np.empty((len(x), self.shape[0]), np.float32)
        bias = None if bias is None else np.ascontiguousarray(bias)
        self._pattern.product(np.ascontiguousarray(values), np.ascontiguousarray(x), bias, y, threads)
        return y

    def input_gradient(self, values: Floats, dy: Floats, threads: int = 1) -> Floats:
        """dy [T, R] -> dx [T, C] = dy·W."""
        dx = np.empty((len(dy), self.shape[1]), np.float32)
        self._pattern.input_gradient(np.ascontiguousarray(values), np.ascontiguousarray(dy), dx, threads)
        return dx

    def weight_gradient(self, x: Floats, dy: Floats, threads: int = 1) -> Floats:
        """x [T, C], dy [T, R] -> the kept entries of dyᵀ·x, [kept]."""
        dvalues = np.empty(self.kept, np.float32)
        self._pattern.weight_gradient(np.ascontiguousarray(x), np.ascontiguousarray(dy), dvalues, threads)
        return dvalues


def _bits(array: NDArray) -> NDArray:
    """The same bytes as unsigned integers: the kernels move elements and never look into them."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")
