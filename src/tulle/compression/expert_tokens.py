"""Which tokens every expert of a block sees while it is compressed.

The compressed model's router decides, as it will when the model runs. The dense block runs the same tokens through the
same experts besides its own choice, so that outputs can be compared. An expert that too few tokens go to is shown
those besides that its router score is highest for: they are the next ones it would get. Neither changes a sum: such
pairs of an expert and a token have weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tulle.compression.block_pass import ParkedBatches
from tulle.models.routing import Routes


@dataclass(frozen=True)
class ExpertTokens:
    """Of one block: tokens that the router gave every expert, and how many it was shown besides."""

    routed: list[int]
    added: list[int]


def route(
    dense: ParkedBatches, compressed: ParkedBatches, valid: Sequence[Tensor | None], experts: int, least: int
) -> ExpertTokens:
    """Decides for all batches, which are parked at the router; ``least``: tokens that every expert is shown."""
    logits = [compressed.outputs(i)[0].flatten(0, -2) for i in range(len(valid))]
    routes = [compressed.block.routes(found) for found in logits]
    real = [_real(mask, len(found), found.device) for mask, found in zip(valid, logits, strict=True)]
    counts = sum(_counts(found, mask, experts) for found, mask in zip(routes, real, strict=True))
    assert isinstance(counts, Tensor)
    added = torch.zeros_like(counts)
    asked: list[list[tuple[Tensor, Tensor]]] = [[] for _ in logits]
    for expert in (counts < least).nonzero().flatten().tolist():
        for batch, tokens in _next(expert, least - int(counts[expert]), logits, routes, real):
            asked[batch].append((torch.full_like(tokens, expert), tokens))
            added[expert] += len(tokens)
    for i, (found, pairs) in enumerate(zip(routes, asked, strict=True)):
        if pairs:
            more = torch.cat([e for e, _ in pairs]), torch.cat([t for _, t in pairs])
            compressed.given[i].asked = more
            found = found.also(*more, len(logits[i]))
        dense.given[i].asked = found.experts, found.tokens
    return ExpertTokens(counts.tolist(), added.tolist())


def _real(mask: Tensor | None, count: int, device: torch.device) -> Tensor:
    """bool ``[N]``."""
    return torch.ones(count, dtype=torch.bool, device=device) if mask is None else mask.flatten()


def _counts(routes: Routes, real: Tensor, experts: int) -> Tensor:
    """Real tokens per expert."""
    return torch.bincount(routes.experts[real[routes.tokens]], minlength=experts)


def _next(
    expert: int, missing: int, logits: Sequence[Tensor], routes: Sequence[Routes], real: Sequence[Tensor]
) -> list[tuple[int, Tensor]]:
    """Of every batch the tokens, ascending, that an expert would get next, ``missing`` together where there are."""
    scores = []
    for found, route, mask in zip(logits, routes, real, strict=True):
        score = found[:, expert].float().masked_fill(~mask, -torch.inf)
        score[route.of_expert(expert)[0]] = -torch.inf
        scores.append(score)
    joined = torch.cat(scores)
    best = joined.topk(min(missing, int(torch.isfinite(joined).sum()))).indices
    chosen = torch.zeros_like(joined, dtype=torch.bool)
    chosen[best] = True
    parts = chosen.split([len(score) for score in scores])
    return [(i, part.nonzero().flatten()) for i, part in enumerate(parts) if bool(part.any())]
