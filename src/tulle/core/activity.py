"""Counting what tokens read of a linear's inputs: which are not zero, and how much of that neighbours share.

An input is *active* if it is not zero where the weights read it. The *overlap* of a token with the one before it is
the share of its active inputs that were active there too. If tokens chose independently, each channel at its own rate
p_j, it would be Σp_j²/Σp_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Counter:
    """Counts of one input, over all tokens that were seen."""

    columns: Tensor
    """Stored weights behind each input channel ``[C]``, of all linears that read it."""
    tokens: int = 0
    active: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Of each channel, in how many tokens ``[C]``."""
    pairs: int = 0
    shared: float = 0.0
    """Σ over neighbouring tokens of |A_t ∩ A_{t−1}|/|A_t|."""

    def see(self, x: Tensor, valid: Tensor) -> None:
        """Takes inputs x ``[B, T, C]`` of the tokens that are ``valid``, bool ``[B, T]``."""
        active = (x != 0) & valid[..., None]
        self.tokens += int(valid.sum())
        self.active = self.active + active.sum((0, 1)).float()
        later, both = active[:, 1:], active[:, 1:] & active[:, :-1]
        real = valid[:, 1:] & valid[:, :-1]
        shares = both.sum(-1) / later.sum(-1).clamp(min=1)
        self.pairs += int(real.sum())
        self.shared += float(shares[real].sum())

    def result(self) -> dict[str, Any]:
        """``weights`` behind the input, ``active`` ones per token, share of zero inputs (``sparsity``), ``overlap`` of
        neighbours and what chance would give for it."""
        share = self.active / max(self.tokens, 1)
        return {
            "weights": int(self.columns.sum()),
            "active": float((self.columns.double() * share.double()).sum()),
            "sparsity": 1 - float(share.mean()),
            "overlap": self.shared / max(self.pairs, 1),
            "chance": float(share.square().sum() / share.sum().clamp(min=1e-12)),
        }


def columns_of(weights: Sequence[Tensor]) -> Tensor:
    """Non-zero weights in each column ``[C]`` of all ``[C_out, C]``."""
    return torch.stack([(weight != 0).sum(0) for weight in weights]).sum(0)
