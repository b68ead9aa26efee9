"""Quantised queries, keys and values, per token and head, so that the KV cache holds ``bits``-bit codes.

Keys are rounded after RoPE. A Hadamard transform of queries and keys over head_dim (QuaRot, Ashkboos et al. 2024,
section 4; DuQuant takes it too) spreads a head's outlier channels and cancels in q·kᵀ. head_dim is the model's own:
the transform covers its largest factor that has a Hadamard matrix. Values are rounded as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tulle.core.head_grids import HeadGrids
from tulle.core.token_grid import TokenGrid
from tulle.methods.contract import BlockState, Decision, Method, Stage
from tulle.models.description import ROLES


@dataclass(frozen=True)
class KVCache(Method):
    """Rounds keys and values (and queries, if asked) to ``bits``. Targets do not matter."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    settles: ClassVar[frozenset[Decision]] = frozenset({"cache"})

    bits: int = 4
    """Bits of a cached key's or value's code, 2 to 8."""
    query_bits: int | None = None
    """Bits of a query's code. Queries are not cached; DuQuant rounds them all the same. Null leaves them alone."""
    symmetric: bool = False
    """True: codes lie around 0; false: every token and head has a zero point of its own."""
    clip: float = 1.0
    """The range of a token and head is multiplied by this ratio before it is divided into steps."""
    hadamard: bool = True
    """Spread queries and keys over head_dim by a Hadamard matrix before they are rounded."""

    def settled_roles(self, decision: Decision, roles: Sequence[str]) -> Sequence[str]:
        return ROLES  # targets do not matter

    def __post_init__(self) -> None:
        self._grids()

    def _grids(self) -> HeadGrids:
        grid = TokenGrid(self.bits, self.symmetric, self.clip)
        query = None if self.query_bits is None else TokenGrid(self.query_bits, self.symmetric, self.clip)
        return HeadGrids(query=query, key=grid, value=grid, hadamard=self.hadamard)

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        block.attention = self._grids()
