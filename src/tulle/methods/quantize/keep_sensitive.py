"""Mixed precision: the most sensitive linears keep more bits.

Every linear of the dense model is rounded alone, weight and input, to the bits that the recipe is going to use, and
scored by its output error on sampled tokens

    e = ‖Q(x)·Q(W)ᵀ − x·Wᵀ‖²/‖x·Wᵀ‖².

The ``count`` largest keep ``keep_bits`` (16: not quantised at all). "Enabling High-Sparsity Foundational Llama Models"
(Agarwalla et al. 2024) leaves the 5 linears with the largest output error out of W8A8. Where a linear keeps its input's
bits, its siblings share that input.

The score is of plain rounding, before any smoothing or rotation but those of the residual stream that come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tulle.core.grid import Grid, find_steps, grouped, round_to_grid
from tulle.core.token_grid import TokenGrid
from tulle.errors import UserError
from tulle.methods.contract import Method, Stage, Statistic, Survey


def output_error(weight: Tensor, x: Tensor, grid: Grid, tokens: TokenGrid | None, relative: bool = True) -> float:
    """e of W ``[C_out, C_in]`` on x ``[T, C_in]``, rounded to nearest; its numerator per token if not ``relative``."""
    step, zero = find_steps(weight, grid)
    parts = grouped(weight, grid.group_size)
    rounded = round_to_grid(parts, step[..., None], zero[..., None], grid).reshape(weight.shape)
    wanted = x @ weight.T
    found = (x if tokens is None else tokens.fake(x)) @ rounded.T
    lost = float((found - wanted).double().square().sum())
    return lost / (max(float(wanted.double().square().sum()), 1e-30) if relative else len(x))


@dataclass(frozen=True)
class KeepSensitive(Method):
    """Chooses linears that keep ``keep_bits``; the quantisers that follow respect it."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"rows"})

    count: int = 5
    keep_bits: int = 16
    bits: int = 8
    """Of the weights, as the recipe is going to quantise them."""
    group_size: int | None = None
    symmetric: bool = True
    input_bits: int | None = 8
    """Of the inputs; None: not quantised."""
    input_symmetric: bool = True
    error: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        self._grids()
        if self.count < 0:
            raise UserError(f"expected a count of 0 or more, found {self.count}; the paper keeps 5")
        if not 2 <= self.keep_bits <= 8 and self.keep_bits != 16:
            raise UserError(f"expected keep_bits of 2 to 8, or 16, found {self.keep_bits}; 16 is not quantised")

    def _grids(self) -> tuple[Grid, TokenGrid | None]:
        tokens = None if self.input_bits is None else TokenGrid(self.input_bits, self.input_symmetric)
        return Grid(self.bits, self.group_size, self.symmetric), tokens

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self._grids()[0].check(name, shape[1])

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        grid, tokens = self._grids()
        scores: dict[str, float] = {}
        siblings: dict[str, list[str]] = {}
        for index in range(survey.layers):
            tensors = survey.block(index)
            for role in roles:
                names = [survey.prefix(index) + name for name in survey.roles[role]]
                for name, full in zip(survey.roles[role], names, strict=True):
                    weight = tensors[f"{name}.weight"]
                    x = survey.rows(index, role)
                    scores[full] = output_error(weight, x, grid, tokens, self.error == "relative")
                    siblings[full] = names
        for name in sorted(scores, key=lambda n: (-scores[n], n))[: self.count]:
            survey.kept[name] = self.keep_bits
            for sibling in siblings[name]:
                survey.kept_inputs[sibling] = self.keep_bits
            survey.notes.append(f"{name} keeps {self.keep_bits} bits: output error {scores[name]:.3g}")
