"""What the pruning methods of single linears share: their settings, and what becomes of the weights once a mask is
chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tulle.core.hessian import Hessian, check_damping
from tulle.core.least_squares import refit
from tulle.core.masks import Pattern, check_sparsity, keep, within
from tulle.core.swaps import check_swaps, swap
from tulle.methods.contract import Decision, LinearState, Method, Statistic, Statistics


@dataclass(frozen=True)
class Pruner(Method):
    """Prunes one linear. Exactly one of ``sparsity`` and ``pattern`` is set."""

    settles: ClassVar[frozenset[Decision]] = frozenset({"mask"})

    sparsity: float | None = None
    """Share of pruned weights, in [0, 1)."""
    pattern: str | None = None
    """``"N:M"``: N kept in every M consecutive input channels."""
    refit: bool = False
    """Fit the kept weights to the layer's outputs after the mask is chosen; needs the Hessian."""
    swaps: int = 0
    """Passes that exchange kept for pruned weights within a row (core.swaps) before the refit; one is all that layers
    up to 512 channels need. 0: none."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        check_swaps(self.swaps, self.refit)
        check_damping(self.damping)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        if self.pattern is not None:
            Pattern.parse(self.pattern).check(name, shape[1])

    def fit(self, linear: LinearState, mask: Tensor, hessian: Hessian, damping: float, start: Tensor) -> None:
        """Leaves the mask, after swaps, and the weights: ``start`` ``[C_out, C_in]`` or the refit to ``linear.weight``.

        ``linear.mask`` is still the mask from before this step.
        """
        if self.refit:
            damped, target = hessian.damped(damping), linear.weight
            if self.swaps:
                # Dead channels count for nothing, whatever the damped H says.
                alive = target.masked_fill(hessian.dead, 0.0)
                pattern = check_sparsity(self.sparsity, self.pattern)
                mask = swap(alive, mask, damped, pattern=pattern, allowed=linear.mask, passes=self.swaps)
            start = refit(target, mask, damped, start)
        self.leave(linear, mask, start)

    def leave(self, linear: LinearState, mask: Tensor, weight: Tensor) -> None:
        linear.mask, linear.weight = mask, weight * mask
        linear.pattern = self.pattern or linear.pattern


class ScorePruner(Pruner):
    """Keeps the highest scores of every output row, or of every stripe."""

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return frozenset({"column_norm", "hessian"} if self.refit else {"column_norm"})

    def score(self, weight: Tensor, column_norm: Tensor) -> Tensor:
        """Scores >= 0 ``[C_out, C_in]`` for W ``[C_out, C_in]`` and ‖X_j‖₂ ``[C_in]``."""
        raise NotImplementedError

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        assert statistics.column_norm is not None
        pattern = check_sparsity(self.sparsity, self.pattern)
        score = within(self.score(linear.weight, statistics.column_norm), linear.mask)
        mask = within(keep(score, self.sparsity, pattern), linear.mask)
        if not self.refit:
            return self.leave(linear, mask, linear.weight)
        hessian = statistics.hessian
        assert hessian is not None
        linear.notes += hessian.remarks(self.damping, self.damping)
        self.fit(linear, mask, hessian, self.damping, linear.weight)
