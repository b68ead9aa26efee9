"""Which tokens go to which experts, and with what weight (mixtures of experts; Shazeer et al. 2017, section 2.1).

A router gives every token a score per expert; the best few are its *chosen* experts, and the layer's output is the sum
of theirs, weighted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tulle.models.description import Router

NORMALISER = 1e-20
"""Added to the sum of the chosen scores before they are divided by it."""


def choose(router: Router, logits: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The chosen experts of every token and their weights, both ``[N, chosen]``, of the router's logits ``[N, E]``.

    ``correction`` ``[E]`` is added to the scores for choosing, not for the weights (DeepSeek-V3, Liu et al. 2024,
    equation 16). With groups, only experts of the best groups are eligible (DeepSeek-V2, section 2.2.2).
    """
    wide = logits.float()
    scores = wide.sigmoid() if router.score == "sigmoid" else wide.softmax(-1)
    eligible = scores if correction is None else scores + correction.float()
    if router.groups > 1:
        eligible = eligible.masked_fill(~_in_best_groups(router, eligible), -torch.inf)
    experts = eligible.topk(router.chosen, -1).indices
    weights = scores.gather(-1, experts)
    if router.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + NORMALISER)
    return experts, weights * router.scale


def _in_best_groups(router: Router, scores: Tensor) -> Tensor:
    """bool ``[N, E]``."""
    grouped = scores.unflatten(-1, (router.groups, -1))
    of_group = grouped.topk(router.group_best, -1).values.sum(-1)
    best = of_group.topk(router.chosen_groups, -1).indices
    mask = torch.zeros_like(of_group, dtype=torch.bool).scatter_(-1, best, True)
    return mask[..., None].expand_as(grouped).flatten(-2)


@dataclass(frozen=True)
class Routes:
    """Pairs of an expert and a token, sorted by expert, then token: ``experts``, ``tokens`` and ``weights``, ``[P]``
    each. A weight of 0: the expert sees the token, but its output does not count."""

    experts: Tensor
    tokens: Tensor
    weights: Tensor

    @classmethod
    def of(cls, experts: Tensor, weights: Tensor) -> Routes:
        """Of chosen experts ``[N, k]`` and their weights."""
        count, chosen = experts.shape
        tokens = torch.arange(count, device=experts.device).repeat_interleave(chosen)
        return cls._sorted(experts.flatten(), tokens, weights.flatten(), count)

    @classmethod
    def _sorted(cls, experts: Tensor, tokens: Tensor, weights: Tensor, count: int) -> Routes:
        order = (experts * count + tokens).argsort()
        return cls(experts[order], tokens[order], weights[order])

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens, ascending, and weights of an expert, ``[n]`` each."""
        rows = self.rows_of(expert)
        return self.tokens[rows], self.weights[rows]

    def rows_of(self, expert: int) -> slice:
        """Its pairs."""
        ends = torch.searchsorted(self.experts, torch.tensor([expert, expert + 1], device=self.experts.device))
        return slice(int(ends[0]), int(ends[1]))

    def counts(self, experts: int) -> Tensor:
        """Tokens per expert, ``[experts]``."""
        return torch.bincount(self.experts, minlength=experts)

    def also(self, experts: Tensor, tokens: Tensor, count: int) -> Routes:
        """With these pairs as well; those that are new have weight 0. ``count``: of all tokens."""
        there = self.experts * count + self.tokens
        asked = (experts * count + tokens).unique()
        new = asked[~torch.isin(asked, there)]
        return self._sorted(
            torch.cat([self.experts, new // count]),
            torch.cat([self.tokens, new % count]),
            torch.cat([self.weights, self.weights.new_zeros(len(new))]),
            count,
        )
