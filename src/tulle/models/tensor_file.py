"""The safetensors container, without torch: a header that is checked, and tensors by position.

Layout: u64 length of the header (little endian), the header in JSON (name → dtype, shape, data_offsets), the data.
Nothing of a header is believed unchecked: a file cannot make a reader allocate more than the file holds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format.pack import bf16_to_f32

DTYPES: Mapping[str, type[np.generic]] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
}  # fmt: skip
"""NumPy dtype that carries each stored dtype; a bfloat16 is the uint16 of its bits, an 8-bit float its byte."""
FLOATS = ("BF16", "F16", "F32", "F64")
"""Stored dtypes that weights may have."""
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

LARGEST_TENSOR = 1 << 56
"""Numbers; NumPy cannot make a view of more, even where one of the sizes is 0."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    """As safetensors calls it (``BF16``); one that is not in :data:`DTYPES` cannot be read."""
    shape: tuple[int, ...]
    file: Path
    stored_as: str | None = None
    """What the file calls a type that is read as ``dtype``, such as GGUF's Q4_K; None: ``dtype``."""
    stored_bytes: int | None = None
    """Of such a type."""

    @property
    def bytes(self) -> int:
        """In the file; 0 for a dtype that cannot be read."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize if self.dtype in DTYPES else 0

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


class TensorFile:
    """One safetensors file: the header in memory, the data mapped tensor by tensor.

    ``data``: the whole file, where it is in memory already. Raises ``UserError`` for a file that is missing, short, or
    contradicts itself. Dtypes that are not known pass until they are read.
    """

    def __init__(self, path: Path, data: NDArray[np.uint8] | None = None):
        self.path, self._data = path, data
        try:
            if data is None:
                with open(path, "rb") as file:
                    self.bytes = os.fstat(file.fileno()).st_size
                    header = self._header(file.read(8), file.read)
            else:
                self.bytes = len(data)
                header = self._header(bytes(data[:8]), lambda n: bytes(data[8 : 8 + n]))
        except OSError as error:
            raise UserError(
                f"expected a safetensors file at {path}, found none that can be read ({error.strerror}); copy it again"
            ) from None
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self._entries = {name: self._entry(name, entry) for name, entry in header.items()}
        self._require_whole()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return sorted(self._entries)

    def info(self, name: str) -> TensorInfo:
        dtype, shape, _, _ = self._entries[name]
        return TensorInfo(dtype, shape, self.path)

    def extent(self, name: str) -> tuple[int, int]:
        """The first byte of a tensor in the file, and how many it has."""
        _, _, begin, end = self._entries[name]
        return self._start + begin, end - begin

    def tensor(self, name: str) -> NDArray[Any]:
        """A view of the mapped file, not to be written to; the mapping lives as long as the view."""
        kind, shape, begin, end = self._entries[name]
        if kind not in DTYPES:
            raise UserError(f"{self.path.name}, {name}: expected a dtype of {', '.join(DTYPES)}, found {kind!r}")
        dtype = np.dtype(DTYPES[kind])
        if begin == end:
            return np.empty(shape, dtype)
        if self._data is not None:
            found = self._data[self._start + begin : self._start + end]
        else:
            found = self._mapped(self._start + begin, end - begin)
        if found.ctypes.data % dtype.itemsize:
            found = found.copy()
        return found.view(dtype).reshape(shape)

    def _mapped(self, offset: int, size: int) -> NDArray[np.uint8]:
        try:
            return np.memmap(self.path, np.uint8, "r", offset, (size,)).view(np.ndarray)
        except (OSError, ValueError) as error:  # it has become shorter, or is gone
            raise UserError(
                f"expected the whole safetensors file {self.path}, found: {error}; leave a model's files alone while "
                "it is read"
            ) from None

    def _header(self, length: bytes, read: Any) -> dict[str, Any]:
        size = int.from_bytes(length, "little")
        if len(length) < 8 or size > LARGEST_HEADER or 8 + size > self.bytes:
            raise self._broken(f"a header of {size} bytes" if len(length) == 8 else "a header of 8 bytes or more")
        self._start = 8 + size
        try:
            header = json.loads(read(size))
        except (ValueError, RecursionError):
            raise self._broken("a header in JSON") from None
        if not isinstance(header, dict):
            raise self._broken("an object as header")
        return header

    def _entry(self, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"dtype, shape and data_offsets for {name}")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(kind, str) and _whole(shape) and _whole(offsets) and len(offsets) == 2):
            raise self._broken(f"a name as dtype and whole numbers as shape and data_offsets of {name}")
        size = offsets[1] - offsets[0]
        if len(shape) > 32 or math.prod(max(n, 1) for n in shape) > LARGEST_TENSOR:
            raise self._broken(f"a shape of {name} that fits into memory")
        if kind in DTYPES and size != math.prod(shape) * np.dtype(DTYPES[kind]).itemsize:
            raise self._broken(f"{size} bytes of {name} as dtype and shape say")
        if size < 0 or self._start + offsets[1] > self.bytes:
            raise self._broken(f"{name} inside the file")
        return kind, tuple(shape), offsets[0], offsets[1]

    def _require_whole(self) -> None:
        """Tensors fill the file without gaps and without sharing bytes, as the format demands."""
        end = 0
        for first, last in sorted((begin, end) for _, _, begin, end in self._entries.values()):
            if first != end:
                raise self._broken("tensors one behind the other")
            end = last
        if self._start + end != self.bytes:
            raise self._broken(f"{self._start + end} bytes")

    def _broken(self, expected: str) -> UserError:
        return UserError(
            f"{self.path}: expected a safetensors file with {expected}, found it truncated or corrupt; copy it again"
        )


def as_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The numbers of a stored float tensor; float64 is rounded."""
    return bf16_to_f32(array) if dtype == "BF16" else array.astype(np.float32, copy=False)


def _whole(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
