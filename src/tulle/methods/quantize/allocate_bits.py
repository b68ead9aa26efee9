"""Bits where they matter: every linear, the embedding and the head get a grid of their own, under a budget of bytes.

For a unit u (a linear or a table) and a grid k, c_u(k) is the mean KL divergence of the next token's distribution from
the dense model's when u alone is rounded to k, estimated to second order on ``tokens`` tokens of the calibration text
(:mod:`tulle.models.fisher`; a head's is computed). Rounded by GPTQ, as the recipe is going to. Then

    minimise Σ_u c_u(k_u)   with   Σ_u bytes_u(k_u) ≤ B,

a multiple-choice knapsack. Its relaxation takes the pieces of the units' lower hulls by falling gain per byte; whole
pieces are taken while they fit (Sinha & Zoltners 1979). HAWQ-V2 (Dong et al. 2020) divides bits by the trace of the
Hessian and the squared error; here the model's own gradients weigh the error that GPTQ leaves.

In a mixture of experts a unit is the gates, the ups or the downs of all experts of a block: rare experts see too few
tokens for a grid of their own. Its cost is that of the experts with the most tokens, scaled up.

Costs are added up as if rounded units did not meet. They do, so that the sum is no forecast of the loss; it is only
used to compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from tulle.core.allocation import lower_hull
from tulle.core.gptq import gptq
from tulle.core.grid import Grid, GroupSize, find_steps
from tulle.core.hessian import Hessian, check_damping
from tulle.core.trials import Key
from tulle.errors import UserError
from tulle.methods.contract import Decision, Method, Stage, Survey

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
ROWS = 8192
"""Of a table that are rounded at once."""


def bytes_of(size: str) -> int:
    """``90MB`` → 90,000,000. Raises ``UserError``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB)\s*", size)
    if found is None:
        raise UserError(f"expected a size such as 90MB or 4.5GB, found {size!r}")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class AllocateBits(Method):
    """Chooses a grid for every linear and table; the quantiser that follows takes it."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    settles: ClassVar[frozenset[Decision]] = frozenset({"grids"})
    takes_tables: ClassVar[bool] = True

    size: str | None = None
    """Budget for all weights of the model, what is not quantised included: ``90MB`` (10^6 bytes), ``4.5GB``."""
    bits: float | None = None
    """Budget in bits per weight of what is targeted, scales included. Either this or ``size``."""
    choices: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Bits of a code that are tried."""
    group_sizes: tuple[GroupSize, ...] = ("auto-64",)
    """Input channels per step that are tried, with every number of bits."""
    symmetric: bool = False
    """True: codes lie around 0, no zero points."""
    scale_bits: Literal[8, 16] = 8
    """Bits of a step."""
    tokens: int = 8192
    """Calibration tokens that costs are estimated on."""
    clip_search: int = 20
    """Clip ratios tried for every step."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if (self.size is None) == (self.bits is None):
            raise UserError("expected one of size and bits in allocate_bits, found both or none; try size: 90MB")
        if self.size is not None:
            bytes_of(self.size)
        if not self.choices or not self.group_sizes:
            raise UserError("expected choices and group_sizes in allocate_bits, found an empty list")
        for bits in self.choices:
            Grid.of(bits, "auto", self.symmetric, None, self.scale_bits)
        if self.tokens < 2:
            raise UserError(f"expected tokens of 2 or more, found {self.tokens}; the default is 8192")

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        for grid in self.grids(shape[1]):
            grid.check(name, shape[1])

    def grids(self, columns: int) -> list[Grid]:
        """What is tried for a linear of so many input channels, without doubles."""
        every = [
            Grid.of(bits, size, self.symmetric, columns, self.scale_bits)
            for bits in self.choices
            for size in self.group_sizes
        ]
        return list(dict.fromkeys(every))

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        assert survey.costs is not None and survey.table is not None and survey.packed_bytes is not None
        units = self._units(survey, roles)
        shapes = {unit: next(iter(members.values())) for unit, members in units.items()}
        tables = {role: name for role, name in survey.tables.items() if name in units}

        def trials(
            index: int, tensors: Mapping[str, Tensor], hessians: Mapping[str, Hessian]
        ) -> Iterator[tuple[Key, dict[str, Tensor]]]:
            for unit, members in survey.units(index, roles).items():
                for role, name in ((role, f"{linear.name}.weight") for role, linear in members):
                    if name not in tensors:  # of an expert that is not here
                        continue
                    for number, grid in enumerate(self.grids(tensors[name].shape[1])):
                        rounded = self._rounded(tensors[name], hessians[role], grid)
                        yield (survey.prefix(index) + unit, number), {name: rounded}

        def of_tables(role: str, hessian: Hessian) -> Iterator[tuple[Key, Tensor]]:
            role = "embedding" if role == "tied" else role
            if role not in tables:
                return
            assert survey.table is not None
            table = survey.table(role).float().to(hessian.matrix.device)
            for number, grid in enumerate(self.grids(table.shape[1])):
                used = hessian if role == "head" or "head" not in survey.tables else None
                yield (tables[role], number), self._rounded(table, used, grid)

        found = survey.costs(
            self.tokens, weights=trials if len(tables) < len(units) else None, tables=of_tables if tables else None
        )  # fmt: skip
        tried = {unit: self.grids(shape[1]) for unit, shape in shapes.items()}
        sizes = [
            [len(members) * survey.packed_bytes(shapes[unit], grid) for grid in tried[unit]]
            for unit, members in units.items()
        ]
        costs = [[found[unit, k] for k in range(len(tried[unit]))] for unit in units]
        every = {name: shape for members in units.values() for name, shape in members.items()}
        chosen = knapsack(sizes, costs, self._budget(survey, every))
        for (unit, members), k in zip(units.items(), chosen, strict=True):
            survey.grids |= dict.fromkeys(members, tried[unit][k])
        total = sum(size[k] for size, k in zip(sizes, chosen, strict=True))
        weights = sum(rows * columns for rows, columns in every.values())
        survey.notes.append(f"{total / 1e6:.2f} MB for {len(every)} weights, {8 * total / weights:.2f} bits each")
        survey.notes += self._lines(survey, roles, tables)

    def _lines(self, survey: Survey, roles: Sequence[str], tables: Mapping[str, str]) -> list[str]:
        """What was chosen, for the report."""
        lines = [f"{name}: {_named(survey.grids[name])}" for name in tables.values()]
        blocks: dict[str, dict[int, Grid]] = {}
        for role in roles:
            for index in range(survey.layers):
                for unit, members in survey.units(index, [role]).items():
                    grid = survey.grids[survey.prefix(index) + members[0][1].name]
                    blocks.setdefault(unit, {})[index] = grid
        for name, own in blocks.items():
            grids = own.values()
            where = "block by block" if len(own) == survey.layers else f"blocks {', '.join(map(str, own))}"
            lines.append(f"{name}, {where}: {', '.join(map(_named, grids))}")
        return lines

    def _units(self, survey: Survey, roles: tuple[str, ...]) -> dict[str, dict[str, tuple[int, int]]]:
        """Units by full name: the full names of what takes one grid, with their shapes."""
        assert survey.table is not None
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for role, name in survey.tables.items():
            if role in roles or (role == "embedding" and "head" not in survey.tables and "head" in roles):
                rows, columns = survey.table(role).shape
                found[name] = {name: (rows, columns)}
        for index in range(survey.layers):
            prefix = survey.prefix(index)
            for unit, members in survey.units(index, roles).items():
                found[prefix + unit] = {prefix + linear.name: linear.shape for _, linear in members}
        return found

    def _budget(self, survey: Survey, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Bytes of what is targeted, by full name."""
        weights = sum(rows * columns for rows, columns in shapes.values())
        if self.size is None:
            assert self.bits is not None
            return int(self.bits * weights / 8)
        others = survey.stored_bytes - sum(survey.weight_bytes(name) for name in shapes)
        left = bytes_of(self.size) - others
        if left <= 0:
            raise UserError(
                f"expected a size above the {others / 1e6:.1f} MB of what allocate_bits does not target, found "
                f"{self.size}; add targets, such as embedding and head"
            )
        return left

    def _rounded(self, weight: Tensor, hessian: Hessian | None, grid: Grid) -> Tensor:
        """W ``[C_out, C_in]`` on the grid, by GPTQ where H is known."""
        if hessian is None:
            hessian = Hessian.identity(weight.shape[1], weight.device)
        factor = hessian.factor(self.damping, descending=True)
        rounded = weight.new_empty(weight.shape)
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS]
            scale, zero = find_steps(rows, grid, hessian.matrix.diagonal(), self.clip_search)
            rounded[start : start + ROWS] = gptq(rows, factor, grid, scale, zero, block=32).dequantise()
        return rounded


def knapsack(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One choice of every unit, so that the sum of their costs is small and that of their sizes at most the budget.

    Raises ``UserError`` where the smallest choices are larger than the budget.
    """
    steps: list[tuple[float, int, int, int]] = []
    found: list[int] = []
    for unit, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        order = sorted(range(len(size)), key=lambda k: (size[k], cost[k]))
        # Larger and no better is never chosen.
        best = [k for n, k in enumerate(order) if all(cost[k] < cost[j] for j in order[:n])]
        hull = lower_hull(np.array([float(size[k]) for k in best]), np.array([cost[k] for k in best]))
        corners = [best[i] for i in hull]
        found.append(corners[0])
        for a, b in zip(corners[:-1], corners[1:], strict=True):
            steps.append(((cost[b] - cost[a]) / (size[b] - size[a]), unit, a, b))
    left = budget - sum(size[k] for size, k in zip(sizes, found, strict=True))
    if left < 0:
        raise UserError(
            f"expected a budget of {(budget - left) / 1e6:.2f} MB or more for allocate_bits, found {budget / 1e6:.2f} "
            "MB; allow fewer bits in choices, larger groups, or a larger size"
        )
    for _, unit, a, b in sorted(steps):
        grown = sizes[unit][b] - sizes[unit][a]
        # A unit that could not take a step takes none of its later ones.
        if found[unit] == a and grown <= left:
            found[unit] = b
            left -= grown
    return found


def _named(grid: Grid) -> str:
    return str(grid.bits) if grid.group_size is None else f"{grid.bits}/{grid.group_size}"
