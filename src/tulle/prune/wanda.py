"""Wanda: Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models".

Score S_ij = |W_ij|·‖X_j‖₂ (eq. 1), compared within each output row (section 3), or in every M consecutive
entries of a row for N:M.

An option of ours: ``refit`` replaces the kept weights by the exact least-squares fit on the same mask. It is off by
default, because a method that leaves the kept weights alone and needs the column norms only is what Wanda means.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tulle.core.contract import LinearState, Method, Statistic, Statistics
from tulle.core.hessian import check_damping
from tulle.core.least_squares import refit
from tulle.core.masks import Pattern, check_sparsity, keep, within


def wanda_score(weight: Tensor, column_norm: Tensor) -> Tensor:
    """|W|·‖X_j‖₂ ``[C_out, C_in]`` for W ``[C_out, C_in]`` and ‖X_j‖₂ ``[C_in]``."""
    return weight.abs() * column_norm


@dataclass(frozen=True)
class Wanda(Method):
    """Prunes by weight times input norm. Exactly one of ``sparsity`` and ``pattern`` is set."""

    sparsity: float | None = None
    """Share of pruned weights in every output row, in [0, 1)."""
    pattern: str | None = None
    """``"N:M"``: N kept in every M consecutive input channels."""
    refit: bool = False
    """Fit the kept weights to the layer's outputs after the mask is chosen; needs the Hessian."""
    damping: float = 0.01
    """Added to the Hessian's diagonal in the refit, as a share of its mean."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        check_damping(self.damping)

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return frozenset({"column_norm", "hessian"} if self.refit else {"column_norm"})

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        if self.pattern is not None:
            Pattern.parse(self.pattern).check(name, shape[1])

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        assert statistics.column_norm is not None
        pattern = check_sparsity(self.sparsity, self.pattern)
        score = within(wanda_score(linear.weight, statistics.column_norm), linear.mask)
        linear.mask = within(keep(score, self.sparsity, pattern), linear.mask)
        linear.pattern = self.pattern or linear.pattern
        if self.refit:
            hessian = statistics.hessian
            assert hessian is not None
            linear.notes += hessian.remarks(self.damping, self.damping)
            linear.weight = refit(linear.weight, linear.mask, hessian.damped(self.damping))
        else:
            linear.weight = linear.weight * linear.mask
