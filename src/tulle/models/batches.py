"""Token sequences in right-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH_TOKENS = 2048
"""Tokens per batch (at least one sequence): bounds the activations inside a block."""


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length. Attention is causal, so padding at the end changes no real token."""

    tokens: Tensor
    """int64 ``[B, T]``."""
    valid: Tensor
    """bool ``[B, T]``."""


def real_tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """The real tokens ``[N, C]`` of x ``[B, T, C]``; ``valid`` None: all of them, and no copy is made."""
    return x.flatten(0, 1) if valid is None else x[valid]


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
