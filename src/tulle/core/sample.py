"""Tokens drawn from a stream of unknown length, each with the same chance."""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """At most ``size`` rows of X ``[T, C]``, a uniform sample of all that were added: those with the largest of seeded
    random keys. Equal streams and seeds give equal samples, however the stream was cut."""

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes tokens ``[T, C]``."""
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._generator)])
        rows = x if self._rows is None else torch.cat([self._rows, x])
        if len(keys) > self.size:
            kept = keys.topk(self.size).indices.sort().values
            keys, rows = keys[kept], rows[kept.to(rows.device)]
        # A copy: a slice would keep the whole batch alive.
        self._keys, self._rows = keys, rows.clone()

    @property
    def rows(self) -> Tensor:
        assert self._rows is not None
        return self._rows
