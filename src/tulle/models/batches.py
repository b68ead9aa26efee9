"""The calibration tokens in batches, and the hidden states of the two streams in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tulle.errors import UserError

BATCH_TOKENS = 2048
"""Tokens per batch (at least one sequence): bounds the activations inside a block."""


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length. Attention is causal, so padding at the end changes no real token."""

    tokens: Tensor
    """int64 ``[B, T]``."""
    valid: Tensor
    """bool ``[B, T]``."""


def batched(sequences: Sequence[Tensor], budget: int = BATCH_TOKENS) -> list[Batch]:
    """Sequences, longest first, in batches of at most ``budget`` tokens including padding."""
    ordered = sorted(sequences, key=len, reverse=True)
    batches: list[Batch] = []
    start = 0
    while start < len(ordered):
        rows = ordered[start : start + max(1, budget // len(ordered[start]))]
        tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(r) for r in rows])
        batches.append(Batch(tokens, torch.arange(tokens.shape[1]) < lengths[:, None]))
        start += len(rows)
    return batches


class HiddenStates:
    """Hidden states ``[B, T, d]`` of every batch, float32, in one file.

    Reading goes through the page cache, so a small run never touches the disk, and a large one is spilled by the
    operating system.
    """

    def __init__(self, file: Path, batches: Sequence[Batch], width: int):
        self.file = file
        self._shapes = [(*b.tokens.shape, width) for b in batches]
        sizes = [4 * s[0] * s[1] * s[2] for s in self._shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.bytes = sum(sizes)

    def write(self, index: int, hidden: Tensor) -> None:
        with open(self.file, "r+b" if self.file.exists() else "w+b") as handle:
            handle.seek(self._offsets[index])
            handle.write(hidden.detach().float().cpu().contiguous().numpy().data)

    def read(self, index: int) -> Tensor:
        shape = self._shapes[index]
        buffer = bytearray(4 * shape[0] * shape[1] * shape[2])
        with open(self.file, "rb") as handle:
            handle.seek(self._offsets[index])
            if handle.readinto(buffer) != len(buffer):
                raise UserError(
                    f"expected {self.bytes} bytes of activations in {self.file}, found fewer; start without --resume"
                )
        return torch.frombuffer(buffer, dtype=torch.float32).reshape(shape)

    def is_whole(self) -> bool:
        return self.file.exists() and self.file.stat().st_size == self.bytes
