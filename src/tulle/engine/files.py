"""Files of the engine's own: read into huge pages, written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.tensor_file import TensorFile

NAMES = {
    np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16", np.dtype(np.uint32): "U32", np.dtype(np.uint64): "U64",
    np.dtype(np.float32): "F32",
}  # fmt: skip
ALIGNMENT = 64
READ = 1 << 26
"""Bytes of one read."""


def huge(size: int) -> NDArray[np.uint8]:
    """Zeroed memory, in huge pages where the system has them: the processor's prefetchers stop at the end of a page,
    and weights that are streamed from 4 KiB pages come at two thirds of the speed."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, max(size, 1), **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size)


def resident(path: Path) -> TensorFile:
    """A safetensors file in memory of its own. Raises ``UserError`` for one that cannot be read."""
    try:
        data = _read(path)
    except OSError as error:
        raise UserError(
            f"expected a safetensors file at {path}, found none that can be read ({error.strerror})"
        ) from None
    return TensorFile(path, data)


def _read(path: Path) -> NDArray[np.uint8]:
    """The file in memory of its own."""
    size = path.stat().st_size
    data = huge(size)
    view, done = data.data, 0
    with open(path, "rb", buffering=0) as file:
        while done < size and (count := file.readinto(view[done : done + READ])):
            done += count
    return data[:done]


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
