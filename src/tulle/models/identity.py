"""A key of a model's contents that does not read them all, for what is made of a model and kept.

It hashes the config and, of every file, its size, its times of modification and of change (mtime, ctime, in
nanoseconds), every tensor's place and a page of it. ctime is set by the system whenever bytes or facts of a file change
and cannot be set back by ``cp -p``, ``rsync -t`` or ``touch``. So a file that was written to has another key even when
size and mtime are kept, and a copied folder has another key than its original: what was made of it is made again.

Where a file system has no ctime (FAT, some network drives) or the clock was set back, the pages remain: of every tensor
(of MOST in a model that has more) one page, its place drawn from the tensor's name. A tensor that was exchanged as a
whole is noticed; a change elsewhere in a tensor, with size, mtime and ctime kept, is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tulle.errors import UserError
from tulle.models.tensor_file import TensorFile

PAGE = 4096
"""Bytes of a sample."""
MOST = 4096
"""Samples, at most."""


def identity(config: Mapping[str, Any], holders: Iterable[TensorFile]) -> str:
    """Of a config and safetensors files (a file may be named several times). Raises ``UserError`` for a file that is
    gone."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = {file.path: file for file in holders}
    share = max(1, MOST // max(len(files), 1))
    for _, file in sorted(files.items()):
        names = file.names()
        extents = [(name, *file.extent(name)) for name in names]
        digest.update(json.dumps([file.path.name, extents]).encode())
        chosen = names if len(names) <= share else [names[i * len(names) // share] for i in range(share)]
        add_file(digest, file.path, [page(name, *file.extent(name)) for name in chosen])
    return digest.hexdigest()


def add_file(digest: Any, path: Path, places: Iterable[tuple[int, int]]) -> None:
    """Adds a file's facts and the bytes at ``(offset, size)`` of it to a hash."""
    try:
        with open(path, "rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            digest.update(f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}".encode())
            for offset, size in places:
                file.seek(offset)
                digest.update(file.read(size))
    except OSError as error:
        raise UserError(f"expected to read {path}, found: {error.strerror}; copy it again") from None


def page(name: str, begin: int, size: int) -> tuple[int, int]:
    """A page inside a tensor."""
    pages = max(1, size // PAGE)
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return begin + drawn % pages * PAGE, min(PAGE, size)
