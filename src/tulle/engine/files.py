"""safetensors files, memory-mapped: nothing is read that is not used, and nothing of a header is believed unchecked."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError

DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "I8": np.int8,
}  # fmt: skip
"""NumPy dtype that carries each stored dtype; a bfloat16 is the uint16 of its bits."""
NAMES = {
    np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16", np.dtype(np.uint32): "U32", np.dtype(np.uint64): "U64",
    np.dtype(np.float32): "F32",
}  # fmt: skip
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
ALIGNMENT = 64
READ = 1 << 26
"""Bytes of one read."""


class TensorFile:
    """One safetensors file, mapped, or read into huge pages where ``resident``. Raises ``UserError`` for a file that is
    missing, short or contradicts itself."""

    def __init__(self, path: Path, resident: bool = False):
        self.path = path
        try:
            self._data = _read(path) if resident else np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise UserError(f"expected a safetensors file at {path}, found none that can be read ({reason})") from None
        if len(self._data) < 8:
            raise self._broken("a header of 8 bytes or more")
        length = int(self._data[:8].view("<u8")[0])
        if length > LARGEST_HEADER or 8 + length > len(self._data):
            raise self._broken(f"a header of {length} bytes")
        try:
            header = json.loads(bytes(self._data[8 : 8 + length]))
        except (ValueError, RecursionError):
            raise self._broken("a header in JSON") from None
        if not isinstance(header, dict):
            raise self._broken("an object as header")
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self._start = 8 + length
        self._entries = {name: self._entry(name, entry) for name, entry in header.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return sorted(self._entries)

    def dtype(self, name: str) -> str:
        """As the file calls it, such as BF16."""
        return self._entries[name][0]

    def tensor(self, name: str) -> NDArray[Any]:
        """A view of the mapped file, not to be written to."""
        kind, shape, begin, end = self._entries[name]
        found = self._data[self._start + begin : self._start + end]
        dtype = np.dtype(DTYPES[kind])
        if found.ctypes.data % dtype.itemsize:
            found = found.copy()
        return found.view(dtype).reshape(shape)

    def _entry(self, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"dtype, shape and data_offsets for {name}")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (_whole(shape) and _whole(offsets) and len(offsets) == 2):
            raise self._broken(f"whole numbers as shape and data_offsets of {name}")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise UserError(f"{self.path.name}, {name}: expected a dtype of {', '.join(DTYPES)}, found {kind!r}")
        size = math.prod(shape) * np.dtype(DTYPES[kind]).itemsize
        if offsets[1] - offsets[0] != size or self._start + offsets[1] > len(self._data):
            raise self._broken(f"{size} bytes of {name}, inside the file")
        return kind, tuple(shape), offsets[0], offsets[1]

    def _broken(self, expected: str) -> UserError:
        return UserError(f"{self.path.name}: expected {expected}, found another length or content; copy the file again")


def huge(size: int) -> NDArray[np.uint8]:
    """Zeroed memory, in huge pages where the system has them: the processor's prefetchers stop at the end of a page,
    and weights that are streamed from 4 KiB pages come at two thirds of the speed."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, max(size, 1), **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size)


def _read(path: Path) -> NDArray[np.uint8]:
    """The file in memory of its own."""
    size = path.stat().st_size
    data = huge(size)
    view, done = data.data, 0
    with open(path, "rb", buffering=0) as file:
        while done < size and (count := file.readinto(view[done : done + READ])):
            done += count
    return data[:done]


def _whole(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


class TensorWriter:
    """Writes a safetensors file one tensor at a time, each at a multiple of 64 bytes, under a temporary name until
    ``finish``. Room for a header of ``reserved`` bytes is left in front.

    The format knows no gaps between tensors, so that they are tensors of bytes themselves.
    """

    def __init__(self, path: Path, reserved: int):
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._reserved = reserved + -(8 + reserved) % ALIGNMENT
        self._header: dict[str, Any] = {}
        self._place = 0

    def __enter__(self) -> TensorWriter:
        self._file = open(self._partial, "wb")
        self._file.seek(8 + self._reserved)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, name: str, tensor: NDArray[Any]) -> None:
        end = self._place + tensor.nbytes
        self._header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._place, end],
        }  # fmt: skip
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        if gap := -end % ALIGNMENT:
            self._file.write(bytes(gap))
            offsets = [end, end + gap]
            self._header[f"__gap__{len(self._header)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": offsets}
        self._place = end + gap

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header and gives the file its name."""
        header = {"__metadata__": dict(metadata)} | self._header
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > self._reserved:
            raise ValueError(f"expected a header of at most {self._reserved} bytes, found {len(text)}")
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + text.ljust(self._reserved))
        self._file.close()
        os.replace(self._partial, self._path)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
