"""SmoothQuant: Xiao et al. 2023. Moves outliers of activations into the weights, channel by channel.

    s_j = max|X_j|^α / max|W_j|^(1−α),    X ← X/s,  W ← s·W    (eqs 3-4)

max|W_j| runs over all linears that read the input. 1/s is folded into what feeds them: the norm's gain (q/k/v and
gate/up), the rows of up (down), the rows of v (o). With grouped-query attention a channel of v is read by every query
head of its KV head, so these share one s: the maxima run over them too. Nothing is left at run time. The formula is in
:mod:`tulle.methods.smoothing`, since others start from it.

Departure: a channel that no calibration token used, or whose weights are all zero, keeps s = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, Method, Stage, Statistic
from tulle.methods.smoothing import Size, group_smoothing


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Smooths the inputs of linears; comes before any transform of them."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"absmax", "column_norm"})
    settles: ClassVar[frozenset[Decision]] = frozenset({"smoothing"})

    alpha: float = 0.5
    """How much of the difficulty moves to the weights, from 0 to 1; DuQuant takes 0.6."""
    size: Size = "max"
    """``rms`` takes norms for the maxima, which is right in front of a rotation (:mod:`tulle.methods.smoothing`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"expected alpha from 0 to 1, found {self.alpha}; SmoothQuant takes 0.5, DuQuant 0.6")

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for role in roles:
            block.fold_diagonal(role, 1 / group_smoothing(block, role, self.alpha, self.size))
