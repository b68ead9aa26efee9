"""Channel permutation before N:M pruning: Pool & Yu, NeurIPS 2021, folded through a decoder block.

The order of a linear's input channels decides what its N:M mask can retain (:mod:`tulle.core.permutation`). An order is
free where what produces the channels can give them out in it. In a decoder block that is so everywhere:

- ``down``: the rows of up and gate;
- ``o``: the rows of v, inside every head, alike for the query heads of one KV head;
- ``qkv`` and ``gate_up``: the residual stream. All readers (columns), all writers (rows), norm gains, embeddings and
  head take one order for the whole model, all experts among them.

Siblings that share an input (q, k, v; gate, up) share its order, searched on all their rows. The permuted model
computes the same function, and nothing of it is left at run time. A pruning step with the same ``pattern`` follows.

What is retained is counted in ``score``: |W_ij|^p as in the paper (``magnitude``) or (|W_ij|·‖X_j‖₂)^p (``wanda``),
for p = 2 the output error that pruning alone would cause if channels were uncorrelated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tulle.core.masks import Pattern
from tulle.core.permutation import efficacy, search
from tulle.core.transform import Permutation, unfold
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, Method, Stage, Statistic, Survey
from tulle.models.description import LinearGroup

RESIDUAL = ("qkv", "gate_up")
MOST_SCORES = 1 << 26
"""Scores of the residual stream's readers that the search sees: rows drawn alike from all of them."""


@dataclass(frozen=True)
class PermuteChannels(Method):
    """Orders input channels so that an N:M mask retains the most; targets say which."""

    stages: ClassVar[tuple[Stage, ...]] = ("model", "block")
    settles: ClassVar[frozenset[Decision]] = frozenset({"order"})

    pattern: str = "2:4"
    """``"N:M"`` of the pruning step that follows."""
    score: Literal["magnitude", "wanda"] = "wanda"
    """What is retained: the weights' sizes, or those times the norms of their inputs."""
    power: float = 2.0
    """p, the power of a score that is summed up; 2 counts squared errors."""
    residual: bool = True
    """Permute the residual stream for q, k, v and gate, up."""
    effort: float = 1.0
    """Scales the number of swaps tried."""

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if self.power <= 0 or self.effort <= 0:
            raise UserError(f"expected power and effort above 0, found {self.power} and {self.effort}; try 2 and 1")

    def changes_residual_basis(self, roles: Sequence[str]) -> bool:
        return self.residual and bool(set(RESIDUAL) & set(roles))

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return frozenset({"column_norm"} if self.score == "wanda" else ())

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        Pattern.parse(self.pattern).check(name, shape[1])

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        """One order of the residual stream, for the readers in ``roles``."""
        wanted = [role for role in RESIDUAL if role in roles]
        experts = [survey.experts_of(index) if "gate_up" in wanted else () for index in range(survey.layers)]
        count = sum(len(survey.readers(index, wanted)) + len(experts[index]) for index in range(survey.layers))
        if not self.residual or not count:
            return
        column_norm = survey.column_norm
        assert column_norm is not None
        if survey.residual:
            raise UserError(
                "expected permute_channels before a rotation of the residual stream, found it after one; a rotation "
                "mixes the channels, so leave one of the two out"
            )
        generator = torch.Generator().manual_seed(survey.seed)
        share = max(MOST_SCORES // survey.hidden // count, 64)
        parts: list[Tensor] = []

        def see(tensors: Mapping[str, Tensor], group: LinearGroup, index: int, key: str) -> None:
            weight = torch.cat([tensors[f"{name}.weight"] for name in group.names])
            rows = torch.randperm(len(weight), generator=generator)[:share].sort().values
            scores = self._scores(weight[rows], column_norm(index, key) if self.score == "wanda" else None)
            # Groups differ in scale and count alike.
            parts.append(scores / scores.mean().clamp(min=1e-30))

        for index in range(survey.layers):
            tensors = survey.block(index)
            for group in survey.readers(index, wanted):
                see(tensors, group, index, group.role)
            for expert in experts[index]:
                reads = expert.groups[0]
                see(survey.expert(index, expert.index), reads, index, reads.names[0])
        order = self._search(torch.cat(parts), survey.seed)
        survey.residual = (Permutation(order),)

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for number, role in enumerate(roles):
            begun = time.perf_counter()
            facts: dict[str, Any] = {"role": role, "pattern": self.pattern}
            reason = self._left_alone(block, role)
            if reason:
                block.permutations.append(facts | {"folded": "", "reason": reason})
                continue
            group = block.groups[role]
            scores = self._scores(
                torch.cat([linear.dense for linear in group.linears]),
                group.statistics.column_norm if self.score == "wanda" else None,
            )
            seed = (block.seed * 1_000_003 + block.index) * 8 + number
            if role in RESIDUAL:
                # It was permuted before the walk; what would have been retained without is found by undoing that.
                order = unfold(block.residual, torch.arange(scores.shape[1])).argsort()
                scores = unfold(block.residual, scores)
                facts["folded"] = "residual stream"
            else:
                order = self._within_heads(scores, block, seed) if role == "o" else self._search(scores, seed)
                block.fold_permutation(role, order)
                facts["folded"] = ", ".join(p.state.name.rpartition(".")[2] for p in block.producers[role])
            found = efficacy(scores, Pattern.parse(self.pattern), order)
            facts |= {"kept_before": found.before, "kept_after": found.after, "ideal": found.ideal}
            block.permutations.append(facts | {"seconds": time.perf_counter() - begun})

    def _left_alone(self, block: BlockState, role: str) -> str:
        """Why a role's channels keep their order; empty if they do not have to."""
        if role in RESIDUAL:
            return "" if self.residual and block.residual else "the residual stream keeps its order"
        if not block.producers[role]:
            return "nothing that produces these channels can give them out in another order"
        m = Pattern.parse(self.pattern).m
        if role == "o" and block.head_dim % m:
            return f"channels stay within their heads of {block.head_dim}, which stripes of {m} do not divide"
        return ""

    def _scores(self, weight: Tensor, norm: Tensor | None) -> Tensor:
        """``[C_out, C_in]``; ``norm`` ‖X_j‖₂ ``[C_in]``."""
        scores = weight.abs() if norm is None else weight.abs() * norm
        return scores if self.power == 1 else scores.pow(self.power)

    def _search(self, scores: Tensor, seed: int) -> Tensor:
        return search(scores.cpu(), Pattern.parse(self.pattern), seed, self.effort).to(scores.device)

    def _within_heads(self, scores: Tensor, block: BlockState, seed: int) -> Tensor:
        """Heads stay where they are; those that share a KV head are ordered alike, all their rows being counted."""
        size, shared = block.head_dim, block.heads // block.kv_heads
        identity = torch.arange(scores.shape[1], device=scores.device)
        order = identity.reshape(block.kv_heads, shared, size).clone()
        by_head = scores.reshape(len(scores), block.kv_heads, shared, size)
        for head in range(block.kv_heads):
            within = self._search(by_head[:, head].reshape(-1, size).contiguous(), seed)
            order[head] = order[head][:, within]
        return order.reshape(-1)
