"""GLM-4.7 Flash: DeepSeek-V3's latent attention and experts in one group. Z.ai 2026."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder
from tulle.models.families._deepseek import feed_forwards, latent_decoder


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    kinds = keys.raw("mlp_layer_types", None)
    dense = 1
    if isinstance(kinds, list):
        dense = kinds.count("dense")
        if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
            raise keys.refused("mlp_layer_types", "dense layers, then sparse ones", kinds)
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        keys.only(key, value)
    keys.raw("partial_rotary_factor")  # of the channels that are rotated, all are
    return latent_decoder(
        keys,
        hidden=2048,
        layers=47,
        heads=20,
        context=202752,
        vocabulary=154880,
        eps=1e-5,
        ranks=(768, 512),
        dims=(192, 64, 256),
        feed_forward=lambda hidden, layers: feed_forwards(
            keys, hidden, layers, 10240, 1536, experts=64, shared=1, chosen=4, dense=dense, groups=(1, 1),
            score="sigmoid", group_best=2, correction=True, normalise=keys.flag("norm_topk_prob", True),
            scale=keys.number("routed_scaling_factor", 1.8),
        ),
        interleaved=keys.flag("rope_interleave", True),
    )  # fmt: skip
