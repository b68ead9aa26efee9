"""Mixed precision: the most sensitive linears keep more bits.

Every linear of the dense model is rounded alone, weight and input, to the bits that the recipe is going to use, and
scored by its output error on sampled tokens

    e = ‖Q(x)·Q(W)ᵀ − x·Wᵀ‖²/‖x·Wᵀ‖².

The ``count`` largest keep ``keep_bits`` (16: not quantised at all). "Enabling High-Sparsity Foundational Llama Models"
(Agarwalla et al. 2024) leaves the 5 linears with the largest output error out of W8A8. Where a linear keeps its input's
bits, its siblings share that input. By default the siblings keep their weights' bits too: readers that compute q, k, v
or gate, up as one linear want one scheme for them.

Experts are not among the candidates: readers want one scheme for all experts of a block, so that one of them would take
all the others along. Their shared expert is.

The score is of plain rounding, before any smoothing or rotation but those of the residual stream that come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tulle.core.grid import Grid, GroupSize, find_steps, grouped, round_to_grid
from tulle.core.token_grid import TokenGrid
from tulle.errors import UserError
from tulle.methods.contract import Decision, Method, Stage, Statistic, Survey


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
    settles: ClassVar[frozenset[Decision]] = frozenset({"bits"})

    count: int = 5
    """Linears that are chosen, in the whole model."""
    keep_bits: int = 16
    """Bits that they keep: 2 to 8, or 16 for not quantised."""
    siblings: bool = True
    """Keep the bits of a chosen linear's siblings (q, k, v; gate, up) too. Readers such as vLLM fuse them and refuse a
    model that gives them different schemes."""
    bits: int = 8
    """Bits of a weight's code, as the recipe is going to quantise."""
    group_size: GroupSize = None
    """Input channels per step, as the recipe is going to quantise."""
    symmetric: bool = True
    """Whether the weights' codes lie around 0."""
    input_bits: int | None = 8
    """Bits of an input's code; null: not quantised."""
    input_symmetric: bool = True
    """Whether the inputs' codes lie around 0."""
    error: Literal["relative", "absolute"] = "relative"
    """Score by e, or by its numerator per token."""

    def __post_init__(self) -> None:
        self._grids()
        if self.count < 0:
            raise UserError(f"expected a count of 0 or more, found {self.count}; the paper keeps 5")
        if not 2 <= self.keep_bits <= 8 and self.keep_bits != 16:
            raise UserError(f"expected keep_bits of 2 to 8, or 16, found {self.keep_bits}; 16 is not quantised")

    def _grids(self, columns: int | None = None) -> tuple[Grid, TokenGrid | None]:
        tokens = None if self.input_bits is None else TokenGrid(self.input_bits, self.input_symmetric)
        return Grid.of(self.bits, self.group_size, self.symmetric, columns), tokens

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self._grids(shape[1])[0].check(name, shape[1])

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        scores: dict[str, float] = {}
        siblings: dict[str, list[str]] = {}
        for index in range(survey.layers):
            tensors = survey.block(index)
            for role, linear in survey.linears(index, roles):
                full, x = survey.prefix(index) + linear.name, survey.rows(index, role)
                grid, tokens = self._grids(linear.shape[1])
                scores[full] = output_error(tensors[f"{linear.name}.weight"], x, grid, tokens, self.error == "relative")
                siblings[full] = [survey.prefix(index) + name for name in survey.groups[index][role].names]
        for name in sorted(scores, key=lambda n: (-scores[n], n))[: self.count]:
            survey.kept[name] = self.keep_bits
            note = f"{name} keeps {self.keep_bits} bits: output error {scores[name]:.3g}"
            for sibling in siblings[name]:
                survey.kept_inputs[sibling] = self.keep_bits
            others = [sibling for sibling in siblings[name] if sibling != name] if self.siblings else []
            survey.kept |= dict.fromkeys(others, self.keep_bits)
            if others:
                also = " and ".join(sibling.rpartition(".")[2] for sibling in others)
                note += f"; {also} keep{'s' if len(others) == 1 else ''} them too, for readers that fuse the group"
            survey.notes.append(note)
