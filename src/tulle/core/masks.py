"""Binary masks with exact counts: the k largest of a row or of a tensor, and N:M patterns.

A mask is bool, True = kept. Counts are exact (``n − round(s·n)`` entries stay) and ties go to the lower
index, so that equal inputs give equal bytes on every machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tulle import native
from tulle.errors import UserError

Scope = Literal["layer", "row"]
"""Where scores are compared: over the whole matrix, or within each output row."""


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: ``n`` kept entries in every ``m`` consecutive input channels."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise UserError(
                f"expected a pattern N:M with 1 <= N <= M, found {self.n}:{self.m}; "
                "write the kept number first, e.g. 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads ``"2:4"``. Raises ``UserError`` for anything that is not an N:M pattern."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if found is None:
            raise UserError(f"expected a pattern such as '2:4', found {text!r}; quote it in YAML: pattern: '2:4'")
        return cls(int(found[1]), int(found[2]))

    def check(self, name: str, columns: int) -> None:
        """Raises ``UserError`` when ``columns`` input channels do not split into stripes of ``m``."""
        if columns % self.m:
            raise UserError(
                f"{name}: expected a number of input channels divisible by {self.m} for the pattern {self}, "
                f"found {columns}; choose another pattern or leave this linear out of the step's targets"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def check_sparsity(sparsity: float | None, pattern: str | None) -> Pattern | None:
    """The pattern of a pruning step's settings; ``UserError`` unless exactly one of the two is given and
    valid.
    """
    if (sparsity is None) == (pattern is None):
        raise UserError(
            f"expected either sparsity or pattern, found sparsity={sparsity} and pattern={pattern}; "
            "set exactly one of them"
        )
    if pattern is not None:
        return Pattern.parse(pattern)
    if not 0 <= sparsity < 1:  # type: ignore[operator]
        raise UserError(f"expected a sparsity in [0, 1), found {sparsity}; 0.5 prunes half of the weights")
    return None


def largest(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores along the last axis; ties go to the lower index."""
    n = scores.shape[-1]
    if keep <= 0 or keep >= n:
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    # The compiled search, ten times faster, compares bits: they have the order of numbers where no sign is set.
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and not bool(scores.signbit().any()):
        flat = scores.detach().reshape(-1, n).numpy()
        return torch.from_numpy(native.keep_largest(flat, keep, torch.get_num_threads())).reshape(scores.shape)
    return largest_plain(scores, keep)


def largest_plain(scores: Tensor, keep: int) -> Tensor:
    """:func:`largest` for 0 < keep < n by torch alone, on any device and for scores of any sign."""
    n = scores.shape[-1]
    threshold = scores.kthvalue(n - keep + 1, dim=-1, keepdim=True).values
    above = scores > threshold
    tied = scores == threshold
    room = keep - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def keep_share(scores: Tensor, sparsity: float, scope: Scope = "row") -> Tensor:
    """Mask that prunes exactly ``round(sparsity·n)`` of the lowest scores ``[C_out, C_in]``.

    n is C_in for ``scope="row"`` and C_out·C_in for ``"layer"``.
    """
    flat = scores.reshape(1, -1) if scope == "layer" else scores
    n = flat.shape[-1]
    return largest(flat, n - round(sparsity * n)).reshape(scores.shape)


def keep_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the N largest scores in every M consecutive input channels; scores ``[C_out, C_in]``, M divides
    C_in.
    """
    stripes = scores.reshape(*scores.shape[:-1], -1, pattern.m)
    # Rank of each entry in its stripe, by M comparisons over the whole tensor: a sort of tiny rows is far
    # slower.
    index = torch.arange(pattern.m, device=scores.device)
    rank = torch.zeros(stripes.shape, dtype=torch.int16, device=scores.device)
    for j in range(pattern.m):
        other = stripes[..., j : j + 1]
        rank += (other > stripes) | ((other == stripes) & (j < index))
    return (rank < pattern.n).reshape(scores.shape)


def keep(scores: Tensor, sparsity: float | None, pattern: Pattern | None, scope: Scope = "row") -> Tensor:
    """The mask that a step's settings ask for: N:M when there is a pattern, else the sparsity."""
    if pattern is not None:
        return keep_pattern(scores, pattern)
    assert sparsity is not None
    return keep_share(scores, sparsity, scope)


def within(values: Tensor, mask: Tensor | None) -> Tensor:
    """Restricts a mask to ``mask``, or gives scores outside it −1, below every score of a kept entry (scores
    are >= 0).
    """
    if mask is None:
        return values
    return values & mask if values.dtype == torch.bool else values.masked_fill(~mask, -1.0)


PATTERNS = ("1:4", "2:4", "4:8")
"""N:M patterns that a mask found in a checkpoint is tried for, the sparsest first."""


def follows(mask: Tensor, pattern: Pattern) -> bool:
    """Whether at most N of every M consecutive input channels are kept; mask bool ``[C_out, C_in]``."""
    if mask.shape[-1] % pattern.m:
        return False
    return bool((mask.reshape(*mask.shape[:-1], -1, pattern.m).sum(-1) <= pattern.n).all())


def zero_share(weight: Tensor) -> float:
    """Share of exact zeros."""
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
