"""Quantisers of queries, keys and values, per token and head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tulle.core.hadamard import hadamard_transform
from tulle.core.paley import hadamard_block
from tulle.core.token_grid import TokenGrid


@dataclass(frozen=True)
class HeadGrids:
    """Quantisers of queries and keys after RoPE and of values, per token and head (over head_dim); None: none."""

    query: TokenGrid | None = None
    key: TokenGrid | None = None
    value: TokenGrid | None = None
    hadamard: bool = False
    """Queries and keys are multiplied by H/√head_dim first, which their products do not see."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rounded queries, keys and values ``[..., head_dim]``, in their dtypes."""
        if self.hadamard:
            block = hadamard_block(query.shape[-1])
            query, key = (hadamard_transform(x, block) for x in (query, key))
        query, key, value = (
            x if grid is None else grid.fake(x)
            for x, grid in ((query, self.query), (key, self.key), (value, self.value))
        )
        return query, key, value
