"""Shares of dropped inputs by cost.

For a unit u (a role in one block, or a block) and a share p, c_u(p) is the mean KL divergence of the next token's
distribution from the dense model's when u's inputs alone are thinned out to 1 − p per token by Top-K, estimated to
second order (:mod:`tulle.models.fisher`) on ``tokens`` tokens of the calibration text. Σ_u c_u(p_u) is minimised under
Σ_u n_u·p_u = S·Σ_u n_u, n_u being the weights that read the inputs: a dropped input is a column that is not read, so
that (1 − S)·Σ n_u weights are active per token. The division is the greedy one by marginal cost, exact on the lower
hull of the curves (core.allocation).

In a mixture of experts those of a block that read one input share a share, the shared expert among them. Of experts a
token reads only those that it goes to: as many weights count.

TEAL's own search (its algorithm 1) is greedy within each block, on that block's output error; this one is over the
whole model, on its predictions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from tulle.core.allocation import divide
from tulle.core.topk import Selection, check_share, top_k
from tulle.core.trials import Key
from tulle.errors import UserError
from tulle.methods.contract import Decision, Method, Stage, Survey
from tulle.models.description import expert_role

DENSITIES = (0.3, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Kept shares that are tried, as multiples of 1 − S."""


@dataclass(frozen=True)
class ActivationBudget(Method):
    """Divides a budget of dropped inputs by what they cost the model; the selecting step that follows respects it."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    settles: ClassVar[frozenset[Decision]] = frozenset({"input sparsities"})

    share: float = 0.5
    """S: share of the weights that a token does not read, in the targets' linears."""
    per: Literal["role", "block"] = "role"
    """What shares one share: the linears of a block that read one input, or all of the block."""
    lowest: float = 0.0
    """No unit gets a smaller share of dropped inputs."""
    highest: float = 0.9
    """No unit gets a larger one."""
    tokens: int = 8192
    """Calibration tokens that costs are estimated on."""

    def __post_init__(self) -> None:
        check_share(self.share)
        if not 0 <= self.lowest <= self.share <= self.highest < 1:
            raise UserError(
                f"expected 0 <= lowest <= share <= highest < 1, found {self.lowest}, {self.share}, {self.highest}; "
                "the defaults are 0 and 0.9"
            )
        if self.tokens < 2:
            raise UserError(f"expected tokens of 2 or more, found {self.tokens}; the default is 8192")

    def levels(self) -> list[float]:
        """Shares that are tried, rising."""
        # Rounded, so that a density of 1 is the share itself and no level of its own.
        tried = {round(1 - (1 - self.share) * d, 9) for d in DENSITIES}
        return sorted({self.lowest, self.highest, self.share} | {s for s in tried if self.lowest < s < self.highest})

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        units = [self._units(survey, index, roles) for index in range(survey.layers)]
        levels = self.levels()
        weights = self._weights(survey, units)
        costs = self._costs(survey, units, levels)
        found = divide(np.array(levels), costs, weights, self.share)
        given = iter(found.tolist())
        for index, own in enumerate(units):
            chosen = list(zip(own, given, strict=False))
            for unit, share in chosen:
                names = (linear.name for role, linear in survey.linears(index, roles, experts=True) if role in unit)
                survey.input_sparsity |= {survey.prefix(index) + name: share for name in names}
            shares = ", ".join(f"{'+'.join(unit)} {share:.3f}" for unit, share in chosen)
            survey.notes.append(f"block {index}: shares of dropped inputs {shares}")

    def _units(self, survey: Survey, block: int, roles: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Roles of each unit of a block."""
        own = tuple(dict.fromkeys(role for role, _ in survey.linears(block, roles, experts=True)))
        if self.per == "block":
            return [own] if own else []
        return [(role,) for role in own]

    def _weights(self, survey: Survey, units: list[list[tuple[str, ...]]]) -> np.ndarray:
        """n ``[U]`` of the weights that a token reads, block by block."""
        sizes: list[float] = []
        for index, own in enumerate(units):
            read: dict[str, float] = defaultdict(float)
            for group in survey.groups[index].values():
                read[group.role] += sum(linear.shape[0] * linear.shape[1] for linear in group.linears)
            experts = survey.experts_of(index)
            for group in experts[0].groups if experts else ():
                read[group.role] += survey.chosen[index] * sum(x.shape[0] * x.shape[1] for x in group.linears)
            sizes += [sum(read[role] for role in unit) for unit in own]
        return np.array(sizes, dtype=np.float64)

    def _costs(self, survey: Survey, units: list[list[tuple[str, ...]]], levels: list[float]) -> np.ndarray:
        """c ``[U, K]``, nats per token."""
        assert survey.costs is not None

        def trials(index: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Key, dict[str, Selection]]]:
            for number, unit in enumerate(units[index]):
                widths = {role: group.inputs for role, group in survey.groups[index].items() if role in unit}
                experts = survey.experts_of(index)
                own = experts[0].groups if experts else ()
                widths |= {expert_role(group.role): group.inputs for group in own if group.role in unit}
                for level in levels:
                    yield (index, number, level), {role: top_k(level, width) for role, width in widths.items()}

        found = survey.costs(self.tokens, inputs=trials)
        return np.array([[found[i, u, s] for s in levels] for i, own in enumerate(units) for u in range(len(own))])
