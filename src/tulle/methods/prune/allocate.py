"""Sparsities by cost: every linear is pruned at several sparsities, and the model's gradients say what that costs.

For a unit u (a linear, the linears of a role in one block, or a block) and a sparsity s, c_u(s) is the mean KL
divergence of the next token's distribution from the dense model's when u alone is pruned to s, estimated to second
order (:mod:`tulle.models.fisher`) on ``tokens`` tokens of the calibration text. The pruner is the cheap one of optimal
brain surgery: scores w²/[H⁻¹]_jj over the whole matrix, and the kept weights fitted by a few steps of conjugate
gradients. Then Σ_u c_u(s_u) is minimised under a budget (core.allocation).

Everything else stays dense in a trial, although all is pruned in the end. Costs measured in a model that the same cheap
pruner has pruned everywhere divided the budget worse at 70 % (docs/log.md).

Budgets: ``zeros``, Σ n_l·s_l = S·Σ n_l; or ``bytes``, as many packed bytes as S everywhere would give with b = ``bits``
for each kept weight, or those that keep_sensitive gave the linear (its step comes first). A linear saves n·(b·s − 1)
bits, the bitmask taking one per weight, and nothing below s = 1/b, where it is stored dense; scales cost the same at
every sparsity.

In a mixture of experts the gates, the ups and the downs of all experts of a block share a sparsity each: rare experts
see too few tokens for one of their own. Their cost is that of the experts with the most tokens, scaled up.

Two passes forward and one backward, however many units there are. Before smoothing and rotations, but those of the
residual stream that come first. The method is ours: OWL's aim, with the model's own answer in place of the guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from tulle.core.allocation import allocate, divide, monotone_curve
from tulle.core.hessian import Hessian, check_damping
from tulle.core.least_squares import refit_iterative
from tulle.core.masks import check_sparsity, keep_share
from tulle.core.trials import Key
from tulle.errors import UserError
from tulle.methods.contract import Decision, Method, Stage, Survey, Unit

DENSITIES = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 2.8)
"""Kept shares that are tried, as multiples of 1 − S."""
GRID = 0.01
"""Sparsities between them are interpolated, this far apart."""


class Surgeon:
    """Prunes W ``[C_out, C_in]`` to any sparsity, given H of its input."""

    def __init__(self, weight: Tensor, hessian: Hessian, damping: float, steps: int):
        factor = hessian.factor(damping)
        self._h, self._weight, self._steps = hessian.damped(factor.damping), weight, steps
        self._score = (weight.square() / factor.upper.square().sum(0)).masked_fill(hessian.dead, 0.0)

    def prune(self, sparsity: float) -> Tensor:
        """Ŵ ``[C_out, C_in]``."""
        mask = keep_share(self._score, sparsity, "layer")
        return refit_iterative(self._weight, mask, self._h, steps=self._steps)


@dataclass(frozen=True)
class Allocate(Method):
    """Divides a budget of pruned weights by what they cost the model; the pruning step that follows respects it."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    settles: ClassVar[frozenset[Decision]] = frozenset({"sparsities"})

    sparsity: float
    """S, mean share of pruned weights."""
    budget: Literal["zeros", "bytes"] = "zeros"
    """What is divided: pruned weights, or packed bytes."""
    bits: int = 16
    """Bits of a kept weight, as the recipe is going to store it; matters to a budget of bytes when others keep more."""
    per: Literal["linear", "role", "block"] = "linear"
    """What shares one sparsity: nothing, the linears that read one input, or all of a block."""
    lowest: float = 0.0
    """No linear gets a smaller share of pruned weights."""
    highest: float = 0.95
    """No linear gets a larger one."""
    tokens: int = 8192
    """Calibration tokens that costs are estimated on."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    steps: int = 10
    """Steps of conjugate gradients per fit."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, None)
        check_damping(self.damping)
        if not 0 <= self.lowest <= self.sparsity <= self.highest < 1:
            raise UserError(
                f"expected 0 <= lowest <= sparsity <= highest < 1, found {self.lowest}, {self.sparsity}, "
                f"{self.highest}; the defaults are 0 and 0.95"
            )
        if not 2 <= self.bits <= 8 and self.bits not in (16, 32):
            raise UserError(f"expected bits of 2 to 8, 16 or 32, found {self.bits}; 16 is a float")
        if self.tokens < 2 or self.steps < 0:
            raise UserError(
                f"expected tokens of 2 and steps of 0 or more, found {self.tokens} and {self.steps}; the defaults are "
                "8192 and 10"
            )

    def levels(self) -> list[float]:
        """Sparsities that are tried, rising."""
        tried = {1 - (1 - self.sparsity) * d for d in DENSITIES}
        return sorted({self.lowest, self.highest} | {s for s in tried if self.lowest < s < self.highest})

    def units(self, survey: Survey, block: int, roles: tuple[str, ...]) -> list[Unit]:
        """Of a block: roles and linears of each unit."""
        if self.per == "linear":
            return list(survey.units(block, roles).values())
        linears = survey.linears(block, roles, experts=True)
        if self.per == "block":
            return [tuple(linears)] if linears else []
        return [tuple(own) for _, own in groupby(linears, key=lambda linear: linear[0])]

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        units, levels = [self.units(survey, index, roles) for index in range(survey.layers)], self.levels()
        weights, bits = self._sizes(survey, units)
        costs = self._costs(survey, units, levels)
        if self.budget == "zeros":
            found = divide(np.array(levels), costs, weights, self.sparsity, GRID)
        else:
            fine = np.unique([*np.arange(self.lowest, self.highest, GRID), self.highest])
            curves = np.array([monotone_curve(np.array(levels), c, fine) for c in costs])
            saved = (np.outer(bits, fine) - weights[:, None]).clip(0)
            gains = allocate(saved, curves, (bits * self.sparsity - weights).clip(0).sum())
            found = np.where(gains > 0, (gains + weights) / bits, self.lowest)
        shares = iter(found.tolist())
        for index, own in enumerate(units):
            given = list(zip(own, shares, strict=False))
            survey.sparsity |= {survey.prefix(index) + linear.name: s for unit, s in given for _, linear in unit}
            survey.notes.append(f"block {index}: sparsities {', '.join(f'{s:.3f}' for _, s in given)}")

    def _sizes(self, survey: Survey, units: list[list[Unit]]) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``[U]`` of the units, block by block, and the bits ``[U]`` of all of them."""
        weights, bits = [], []
        for index, own in enumerate(units):
            prefix = survey.prefix(index)
            for unit in own:
                count = [linear.shape[0] * linear.shape[1] for _, linear in unit]
                each = [survey.kept.get(prefix + linear.name, self.bits) for _, linear in unit]
                weights.append(sum(count))
                bits.append(sum(n * b for n, b in zip(count, each, strict=True)))
        return np.array(weights, dtype=np.float64), np.array(bits, dtype=np.float64)

    def _costs(self, survey: Survey, units: list[list[Unit]], levels: list[float]) -> np.ndarray:
        """c ``[U, K]``, nats per token."""
        assert survey.costs is not None

        def trials(
            index: int, tensors: Mapping[str, Tensor], hessians: Mapping[str, Hessian]
        ) -> Iterator[tuple[Key, dict[str, Tensor]]]:
            for number, unit in enumerate(units[index]):
                surgeons = {
                    (name := f"{linear.name}.weight"): Surgeon(tensors[name], hessians[role], self.damping, self.steps)
                    for role, linear in unit
                    if f"{linear.name}.weight" in tensors
                }
                for level in levels if surgeons else ():
                    yield (index, number, level), {name: surgeon.prune(level) for name, surgeon in surgeons.items()}

        found = survey.costs(self.tokens, weights=trials)
        return np.array([[found[i, u, s] for s in levels] for i, own in enumerate(units) for u in range(len(own))])
