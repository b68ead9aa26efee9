"""An output folder that appears whole or not at all, and safetensors written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.models.checkpoint import DTYPES, SINGLE, write_index

SHARD_BYTES = 5_000_000_000
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its header is known before its data is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yields ``OUT.partial``; renames it to ``output`` on success, removes it on failure.

    Raises ``UserError`` when ``output`` exists and is not an empty folder, or when the disk refuses.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"expected a new or empty output folder, found {output} in use; choose another -o")
    partial = output.with_name(output.name + ".partial")
    try:
        # Left by a run that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Libraries raise OSError of their own, without errno; those are not about the disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"expected to write {output}, found: {error}; free some space or choose another -o"
            ) from None
        raise


def write_entries(
    folder: Path,
    entries: Sequence[Entry],
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes the tensors as ``model.safetensors`` or as numbered shards with an index; returns their bytes.

    Memory: one tensor. ``progress`` gets bytes done and in all.
    """
    # Wide dtypes first keeps every tensor aligned, as the safetensors library does.
    shards = _shards(sorted(entries, key=lambda e: e.name), shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    total = sum(e.bytes for e in entries)
    done = 0
    for file, shard in zip(names, shards, strict=True):
        for bytes_written in _write_shard(folder / file, sorted(shard, key=lambda e: (-e.dtype.itemsize, e.name))):
            done += bytes_written
            if progress is not None:
                progress(done, total)
    if len(shards) > 1:
        write_index(folder, {f: [e.name for e in s] for f, s in zip(names, shards, strict=True)}, total)
    return total


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.bytes
    return shards


def _write_shard(file: Path, entries: Sequence[Entry]) -> Iterator[int]:
    """The safetensors container: u64 length of the header, JSON header padded to 8 bytes, data.

    Yields the bytes of each tensor written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for e in entries:
        header[e.name] = {
            "dtype": CODES[e.dtype],
            "shape": list(e.shape),
            "data_offsets": [offset, offset + e.bytes],
        }
        offset += e.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for e in entries:
            tensor = e.make().contiguous()
            if tensor.dtype != e.dtype or tuple(tensor.shape) != e.shape:
                raise AssertionError(f"{e.name}: {e.dtype} {e.shape} announced, made {tensor.dtype} {tensor.shape}")
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield e.bytes
        out.flush()
        os.fsync(out.fileno())
