"""Magnitude pruning: keep the largest |W|.

The baseline of every pruning paper (Han et al. 2015, "Learning both Weights and Connections"). Data-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tulle.core.masks import Pattern, Scope, check_sparsity, keep, within
from tulle.methods.contract import Decision, LinearState, Method, Statistics


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|, ``[C_out, C_in]``."""
    return weight.abs()


@dataclass(frozen=True)
class Magnitude(Method):
    """Prunes the smallest weights. Exactly one of ``sparsity`` and ``pattern`` is set."""

    settles: ClassVar[frozenset[Decision]] = frozenset({"mask"})

    sparsity: float | None = None
    """Share of pruned weights, in [0, 1)."""
    pattern: str | None = None
    """``"N:M"``: N kept in every M consecutive input channels."""
    scope: Scope = "layer"
    """Weights are compared over the whole matrix or within each output row; no effect on a pattern."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        if self.pattern is not None:
            Pattern.parse(self.pattern).check(name, shape[1])

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        pattern = check_sparsity(self.sparsity, self.pattern)
        score = within(magnitude_score(linear.weight), linear.mask)
        linear.mask = within(keep(score, self.sparsity, pattern, self.scope), linear.mask)
        linear.pattern = self.pattern or linear.pattern
        linear.weight = linear.weight * linear.mask
