"""DeepSeek-V2: latent attention; experts, chosen in groups or not, by their softmax, and shared ones. DeepSeek-AI
2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder
from tulle.models.families._deepseek import feed_forwards, latent_decoder

METHODS = {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    keys.only("scoring_func", "softmax")
    keys.only("norm_topk_prob", False)  # transformers does not read it
    grouped = keys.choice("topk_method", "greedy", METHODS) == "group_limited_greedy"
    if not grouped:
        keys.raw("n_group"), keys.raw("topk_group")  # of the other method
    return latent_decoder(
        keys,
        hidden=4096,
        layers=32,
        heads=32,
        context=2048,
        vocabulary=102400,
        feed_forward=lambda hidden, layers: feed_forwards(
            keys, hidden, layers, 11008, 1407, experts=64, shared=2, chosen=None, dense=0,
            groups=(None, None) if grouped else None, group_best=1, correction=False,
            scale=keys.number("routed_scaling_factor", 1.0),
        ),
        interleaved=True,
        mlp_bias=keys.flag("mlp_bias", False),
    )  # fmt: skip
