"""OWL: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity" (ICML).

With the scores A_ij = ‖X_j‖₂·|W_ij| of all linears of decoder block l taken together, D_l is the share of scores above
M times their mean (layerwise outlier distribution). Blocks with more outliers are pruned less: S_l falls linearly with
D_l over a width of 2λ, and the mean of S_l is S. Every linear of a block takes the block's S_l. M = 5, λ = 0.08.

As in the authors' code the mean, not the middle, of S_l stands at S, so that a lone block may lie up to 2λ from it.

In a mixture of experts a block's linears are those of all its experts, too. An expert that fewer tokens go to has
smaller ‖X_j‖; they count as if all tokens went there, so that D says what is in the weights.

Departure: the mean is weighted by the number of weights (which in models of equal blocks is no difference). The pruning
step that follows respects S_l; one with an N:M pattern cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.masks import check_sparsity
from tulle.errors import UserError
from tulle.methods.contract import Decision, Method, Stage, Statistic, Survey


def outlier_share(scores: Iterable[Tensor], multiple: float = 5.0) -> float:
    """D of a block's linears with the scores A, any shapes: the share above M = ``multiple`` times the common mean.
    Goes through ``scores`` twice."""
    count, total = 0, 0.0
    for a in scores:
        count, total = count + a.numel(), total + float(a.double().sum())
    return sum(int((a > multiple * total / count).sum()) for a in scores) / count


def owl(shares: Tensor, sizes: Tensor, sparsity: float, spread: float = 0.08) -> Tensor:
    """S_l ``[L]`` float64 for D ``[L]``, numbers of weights ``[L]``, S and λ; the mean weighted by ``sizes`` is S."""
    d, n = shares.double(), sizes.double()
    width = d.max() - d.min()
    kept = 2 * spread * (d - d.min()) / width if width > 0 else torch.zeros_like(d)
    return sparsity - kept + (kept * n).sum() / n.sum()


@dataclass(frozen=True)
class _Scores:
    """A of a block's linears, one expert in memory at a time."""

    survey: Survey
    index: int
    roles: tuple[str, ...]

    def __iter__(self) -> Iterator[Tensor]:
        survey, index = self.survey, self.index
        assert survey.column_norm is not None
        tensors = survey.block(index)
        for role, linear in survey.linears(index, self.roles):
            yield tensors[f"{linear.name}.weight"].abs() * survey.column_norm(index, role)
        for expert in survey.experts_of(index):
            tensors = survey.expert(index, expert.index)
            for group in (group for group in expert.groups if group.role in self.roles):
                norm = survey.column_norm(index, group.names[0])
                for name in group.names if bool(norm.any()) else ():  # no token goes there
                    yield tensors[f"{name}.weight"].abs() * norm


@dataclass(frozen=True)
class OWL(Method):
    """Gives blocks with more outliers a lower sparsity; the pruning step that follows respects it."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"column_norm"})
    settles: ClassVar[frozenset[Decision]] = frozenset({"sparsities"})

    sparsity: float
    """S, mean share of pruned weights."""
    spread: float = 0.08
    """λ: sparsities span 2λ."""
    multiple: float = 5.0
    """M: a score this many times the mean is an outlier."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, None)
        if not 0 <= self.spread < 0.5:
            raise UserError(f"expected a spread in [0, 0.5), found {self.spread}; the paper uses 0.08")
        if not self.multiple > 0:
            raise UserError(f"expected a positive multiple, found {self.multiple}; the paper uses 3 to 10")

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        assert survey.column_norm is not None
        shares, sizes = [], []
        blocks = [index for index in range(survey.layers) if survey.linears(index, roles, experts=True)]
        for index in blocks:
            shares.append(outlier_share(_Scores(survey, index, roles), self.multiple))
            linears = survey.linears(index, roles, experts=True)
            sizes.append(sum(linear.shape[0] * linear.shape[1] for _, linear in linears))
        found = owl(torch.tensor(shares), torch.tensor(sizes), self.sparsity, self.spread).tolist()
        for index, s, d in zip(blocks, found, shares, strict=True):
            if not 0 <= s < 1:
                raise UserError(
                    f"expected sparsities in [0, 1), found {s:.3f} for block {index}; lower the spread of owl"
                )
            linears = survey.linears(index, roles, experts=True)
            survey.sparsity |= {survey.prefix(index) + linear.name: s for _, linear in linears}
            survey.notes.append(f"block {index}: {100 * d:.2f} % outliers, sparsity {s:.4f}")
