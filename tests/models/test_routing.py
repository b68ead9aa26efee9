"""Which tokens go to which experts: against loops over tokens, and pairs that are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tulle.models.description import Linear, Router
from tulle.models.routing import Routes, choose

EXPERTS = 8
ROUTERS = [
    Router(Linear("gate", (EXPERTS, 4)), EXPERTS, 3),
    Router(Linear("gate", (EXPERTS, 4)), EXPERTS, 2, normalise=True, scale=2.5),
    Router(Linear("gate", (EXPERTS, 4)), EXPERTS, 3, "sigmoid", True, 1.5, "bias", 4, 2, 2),
    Router(Linear("gate", (EXPERTS, 4)), EXPERTS, 2, groups=2, chosen_groups=1),
]


def one_token(router: Router, logits: list[float], correction: list[float]) -> dict[int, float]:
    """Chosen experts and weights, by sorting."""
    wide = torch.tensor(logits, dtype=torch.float64)
    scores = (wide.sigmoid() if router.score == "sigmoid" else wide.softmax(0)).tolist()
    eligible = {e: s + correction[e] for e, s in enumerate(scores)}
    size = router.experts // router.groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.groups)]
    best = sorted(groups, key=lambda g: -sum(sorted((eligible[e] for e in g), reverse=True)[: router.group_best]))
    allowed = [e for group in best[: router.chosen_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -eligible[e])[: router.chosen]
    total = sum(scores[e] for e in chosen) if router.normalise else 1
    return {e: scores[e] / total * router.scale for e in chosen}


@pytest.mark.parametrize("router", ROUTERS)
def test_chosen_experts_and_weights_are_those_of_a_loop_over_tokens(router: Router) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, EXPERTS, generator=generator)
    correction = torch.randn(EXPERTS, generator=generator) if router.correction else torch.zeros(EXPERTS)
    experts, weights = choose(router, logits, correction if router.correction else None)
    for token in range(50):
        wanted = one_token(router, logits[token].tolist(), correction.tolist())
        found = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        assert found == pytest.approx(wanted, rel=1e-5)


def pairs(routes: Routes) -> dict[tuple[int, int], float]:
    return {(int(e), int(t)): float(w) for e, t, w in zip(routes.experts, routes.tokens, routes.weights, strict=True)}


def routes_of(seed: int) -> tuple[Routes, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(20)])
    return Routes.of(experts, torch.rand(20, 3, generator=generator) + 0.1), experts


def test_every_expert_has_its_tokens_in_order() -> None:
    routes, experts = routes_of(2)
    for expert in range(EXPERTS):
        tokens, weights = routes.of_expert(expert)
        assert tokens.tolist() == sorted(t for t in range(20) if expert in experts[t])
        assert len(weights) == len(tokens)
    assert routes.counts(EXPERTS).tolist() == [int((experts == e).sum()) for e in range(EXPERTS)]


def test_pairs_that_are_asked_for_join_with_weight_zero() -> None:
    routes, _ = routes_of(3)
    before, (experts, tokens) = pairs(routes), (torch.tensor([0, 7, 7, 0]), torch.arange(4))
    after = pairs(routes.also(experts, tokens, 20))
    asked = set(zip(experts.tolist(), tokens.tolist(), strict=True))
    assert after.keys() == before.keys() | asked
    assert all(after[pair] == before.get(pair, 0.0) for pair in after)
    assert len(after) > len(before)
