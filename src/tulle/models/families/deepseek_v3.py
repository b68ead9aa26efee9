"""DeepSeek-V3 and R1: latent attention; the first layers dense, then experts in groups and a shared one. Liu et al.
2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder
from tulle.models.families._deepseek import feed_forwards, latent_decoder


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        keys.only(key, value)
    return latent_decoder(
        keys,
        hidden=7168,
        layers=61,
        heads=128,
        context=4096,
        vocabulary=129280,
        feed_forward=lambda hidden, layers: feed_forwards(
            keys, hidden, layers, 18432, 2048, experts=256, shared=1, chosen=8, dense=3, groups=(8, 4),
            score="sigmoid", group_best=2, correction=True, normalise=keys.flag("norm_topk_prob", True),
            scale=keys.number("routed_scaling_factor", 2.5),
        ),
        interleaved=keys.flag("rope_interleave", True),
    )  # fmt: skip
