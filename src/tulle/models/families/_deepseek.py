"""What DeepSeek's families and those after them share: first layers dense, then experts in groups and a shared one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import GatedMLP, Mixture
from tulle.models.families._parts import expert_count, gated, router


def feed_forwards(
    keys: ConfigKeys,
    hidden: int,
    layers: int,
    intermediate: int,
    own: int,
    *,
    experts: int,
    shared: int,
    chosen: int,
    dense: int,
    groups: tuple[int, int],
    correction: bool,
    group_best: int,
    **settings: Any,
) -> list[GatedMLP | Mixture]:
    """Of all layers. Numbers are the family's defaults: of a dense layer's width, of an expert's ``own``, and of
    experts, shared ones (all one wide expert here), first layers that are ``dense``, groups and chosen groups;
    ``settings``: of :class:`tulle.models.description.Router`."""
    plain = gated(keys, keys.size("intermediate_size", intermediate))
    width = keys.size("moe_intermediate_size", own)
    routing = router(
        keys, "mlp.gate", hidden, expert_count(keys, experts), keys.size("num_experts_per_tok", chosen),
        groups=keys.size("n_group", groups[0]), chosen_groups=keys.size("topk_group", groups[1]),
        group_best=group_best, correction="mlp.gate.e_score_correction_bias" if correction else None, **settings,
    )  # fmt: skip
    mixture = Mixture(
        routing,
        replace(plain, intermediate=width, name="mlp.experts"),
        replace(plain, intermediate=width * keys.size("n_shared_experts", shared), name="mlp.shared_experts"),
    )
    first = keys.raw("first_k_dense_replace", dense)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise keys.refused("first_k_dense_replace", "a whole number of layers", first)
    return [plain if index < first else mixture for index in range(layers)]
