"""Hidden states on disk: those between two blocks, and those of sequences parked inside one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.models.batches import Batch


class HiddenStates:
    """Hidden states ``[B, T, d]`` of every batch in one file, in the dtype that the blocks compute in.

    Reading goes through the page cache, so a small run never touches the disk, and a large one is spilled by the
    operating system.
    """

    def __init__(self, file: Path, batches: Sequence[Batch], width: int, dtype: torch.dtype = torch.float32):
        self.file, self._dtype = file, dtype
        self._shapes = [(*b.tokens.shape, width) for b in batches]
        sizes = self._sizes = [dtype.itemsize * s[0] * s[1] * s[2] for s in self._shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.bytes = sum(sizes)

    def write(self, index: int, hidden: Tensor) -> None:
        with open(self.file, "r+b" if self.file.exists() else "w+b") as handle:
            handle.seek(self._offsets[index])
            handle.write(hidden.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)

    def read(self, index: int) -> Tensor:
        buffer = bytearray(self._sizes[index])
        with open(self.file, "rb") as handle:
            handle.seek(self._offsets[index])
            if handle.readinto(buffer) != len(buffer):
                raise UserError(
                    f"expected {self.bytes} bytes of activations in {self.file}, found fewer; start without --resume"
                )
        return torch.frombuffer(buffer, dtype=self._dtype).reshape(self._shapes[index])

    def is_whole(self) -> bool:
        return self.file.exists() and self.file.stat().st_size == self.bytes


class Parking:
    """Where tensors of parked sequences lie: in memory, or in unnamed files of ``folder`` that are mapped.

    Mapped tensors go through the page cache, so that the operating system writes them out where memory is short. A
    killed run leaves nothing of them behind.
    """

    def __init__(self, folder: Path, on_disk: bool):
        self._folder, self._on_disk = folder, on_disk

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor's values, in memory or mapped."""
        if not self._on_disk:
            return tensor
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="parked-") as file:
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.reshape(tensor.shape).copy_(tensor)
