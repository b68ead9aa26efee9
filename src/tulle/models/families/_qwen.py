"""What Qwen's families with experts share: which layers have them, and a shared expert with a gate."""

from __future__ import annotations

from dataclasses import replace

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import GatedMLP, Linear, Mixture
from tulle.models.families._parts import expert_count, gated, router


def feed_forwards(
    keys: ConfigKeys,
    hidden: int,
    layers: int,
    intermediate: int,
    own: int,
    *,
    experts: int,
    chosen: int,
    shared: int | None = None,
    normalise: bool | None = False,
) -> list[GatedMLP | Mixture]:
    """Of all layers. Numbers are the family's defaults: of a dense layer's width, of an expert's ``own``, of the
    ``shared`` one's. ``normalise`` None: always."""
    dense = gated(keys, keys.size("intermediate_size", intermediate))
    count = expert_count(keys, experts)
    normalise = True if normalise is None else keys.flag("norm_topk_prob", normalise)
    routing = router(keys, "mlp.gate", hidden, count, keys.size("num_experts_per_tok", chosen), normalise=normalise)
    mixture = Mixture(
        routing,
        replace(dense, intermediate=keys.size("moe_intermediate_size", own), name="mlp.experts"),
        None if shared is None else replace(
            dense, intermediate=keys.size("shared_expert_intermediate_size", shared), name="mlp.shared_expert"
        ),
        None if shared is None else Linear("mlp.shared_expert_gate", (1, hidden)),
    )  # fmt: skip
    step, without = keys.size("decoder_sparse_step", 1), keys.raw("mlp_only_layers", None) or []
    if not isinstance(without, list):
        raise keys.refused("mlp_only_layers", "a list of layers", without)
    return [dense if index in without or (index + 1) % step else mixture for index in range(layers)]
