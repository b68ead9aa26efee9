"""GGUF files, memory-mapped: metadata and where each tensor's bytes lie.

The format's specification is part of ggml. The ``gguf`` library knows the types and their sizes; the header is
read here, because the library's reader believes a header (a file of 100 bytes that claims 2^60 elements keeps it busy
for ever) and takes two seconds for a vocabulary of 49,152.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from tulle.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of tensors, unless ``general.alignment`` says otherwise."""
MOST_DIMENSIONS = 4
DEEPEST = 2
"""Of arrays in arrays."""
NUMBERS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a file that begins as GGUF files do, or is named as one."""
    path = Path(path)
    if not path.is_file():
        return path.suffix == ".gguf"
    with open(path, "rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor. ``shape`` is in NumPy's order, the last axis contiguous: ``[C_out, C_in]`` of a linear."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""
    bytes: int


class GgufFile:
    """A GGUF file's metadata and tensors.

    ``metadata``: key → number, bool, str, or an array: a NumPy one of numbers, a list of strings. Raises ``UserError``
    for a file that is missing, damaged, of another version, or that claims what it cannot hold.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._data = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise UserError(f"expected a GGUF file at {self.path}, found none that can be read ({reason})") from None
        self._place = 0
        if bytes(self._data[:4]) != MAGIC:
            raise UserError(f"expected {self.path.name} to begin with GGUF, found {bytes(self._data[:4])!r}")
        self._place = 4
        version = int(self._number("<u4"))
        if version not in VERSIONS:
            swapped = struct.unpack("<I", struct.pack(">I", version))[0]
            hint = "it is big-endian; convert it again" if swapped in VERSIONS else "convert it again with a newer tool"
            raise UserError(f"expected version 2 or 3 of GGUF in {self.path.name}, found {version}; {hint}")
        tensors, keys = self._count(24), self._count(13)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            self.metadata[key] = self._value(self._type(), 0)
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise self._broken(f"general.alignment as a multiple of 8, found {alignment!r}")
        found = [self._tensor() for _ in range(tensors)]
        start = -(-self._place // alignment) * alignment
        self.tensors: dict[str, TensorEntry] = {}
        for name, kind, shape, offset in found:
            self.tensors[name] = self._entry(name, kind, shape, start + offset)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes as they are stored, ``[..., bytes of a row]``; a view of the mapped file."""
        entry = self.tensors[name]
        data = self._data[entry.start : entry.start + entry.bytes]
        return np.asarray(data).reshape(*entry.shape[:-1], -1)

    def header_bytes(self) -> NDArray[np.uint8]:
        """Everything before the tensors' data."""
        return np.asarray(self._data[: self._place])

    def _broken(self, expected: str) -> UserError:
        return UserError(f"{self.path.name}: expected {expected}; the file is damaged, copy it again")

    def _take(self, size: int) -> int:
        """Moves on by so many bytes; returns where they begin."""
        begin, end = self._place, self._place + size
        if end > len(self._data):
            raise self._broken(f"{size} bytes at {begin}, found the end of the file")
        self._place = end
        return begin

    def _number(self, dtype: str) -> Any:
        size = np.dtype(dtype).itemsize
        begin = self._take(size)
        return np.asarray(self._data[begin : begin + size]).view(dtype)[0]

    def _count(self, least: int) -> int:
        """A number of things that take at least so many bytes each: no more than the file has room for."""
        found = int(self._number("<u8"))
        if found * least > len(self._data) - self._place:
            raise self._broken(f"a count that the file has room for at {self._place}, found {found}")
        return found

    def _string(self) -> str:
        length = self._count(1)
        begin = self._take(length)
        # Tokens of some files are no valid UTF-8.
        return bytes(self._data[begin : begin + length]).decode("utf-8", "replace")

    def _type(self) -> GGUFValueType:
        found = int(self._number("<u4"))
        try:
            return GGUFValueType(found)
        except ValueError:
            raise self._broken(f"a type of value from 0 to 12, found {found}") from None

    def _value(self, kind: GGUFValueType, depth: int) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is not GGUFValueType.ARRAY:
            return self._number(NUMBERS[kind]).item()
        of = self._type()
        if of is GGUFValueType.ARRAY:
            if depth >= DEEPEST:
                raise self._broken(f"arrays within at most {DEEPEST} others, found more")
            return [self._value(of, depth + 1) for _ in range(self._count(12))]
        if of is GGUFValueType.STRING:
            return self._strings(self._count(8))
        dtype = np.dtype(NUMBERS[of])
        count = self._count(dtype.itemsize)
        begin = self._take(count * dtype.itemsize)
        return np.asarray(self._data[begin : begin + count * dtype.itemsize]).view(dtype)

    def _strings(self, count: int) -> list[str]:
        """Many strings: from one copy of the header's rest, since each slice of a mapping costs microseconds."""
        view, place, found = self._data.view(np.ndarray).data, self._place, []
        end = len(view)
        for _ in range(count):
            if place + 8 > end:
                raise self._broken(f"a string at {place}, found the end of the file")
            length = int.from_bytes(view[place : place + 8], "little")
            place += 8
            if length > end - place:
                raise self._broken(f"a string of {length} bytes at {place}, found the end of the file")
            found.append(bytes(view[place : place + length]).decode("utf-8", "replace"))
            place += length
        self._place = place
        return found

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), int(self._number("<u4"))
        if dimensions > MOST_DIMENSIONS:
            raise self._broken(f"at most {MOST_DIMENSIONS} dimensions of {name}, found {dimensions}")
        shape = [int(self._number("<u8")) for _ in range(dimensions)]
        return name, int(self._number("<u4")), tuple(reversed(shape)), int(self._number("<u8"))

    def _entry(self, name: str, kind: int, shape: tuple[int, ...], start: int) -> TensorEntry:
        try:
            of = GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(
                f"{self.path.name}, {name}: expected a type that the gguf library knows, found number {kind}; "
                "requantise the file with a common type, such as Q4_K or Q8_0"
            ) from None
        block, size = GGML_QUANT_SIZES[of]
        width = shape[-1] if shape else 1
        if 0 in shape:
            raise self._broken(f"sizes of {name} above 0, found {list(shape)}")
        if width % block:
            raise self._broken(f"rows of {name} in whole blocks of {block}, found {width}")
        count = math.prod(shape) // block * size
        if start + count > len(self._data):
            raise self._broken(f"{count} bytes of {name} at {start}, found the end of the file")
        return TensorEntry(of, shape, start, count)
