"""gpt-oss: attention with sinks and biases, every other layer with a window; experts with biases and clamped gates,
whose weights may be MXFP4. OpenAI 2025."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Mixture, Norm
from tulle.models.families._parts import (
    build_decoder,
    every,
    expert_count,
    gated,
    head_sizes,
    layer_types,
    llama_norms,
    read_rotary,
    router,
)

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
"""Where the config says nothing."""


def describe(config: Mapping[str, Any]) -> Decoder:
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config = {**config, "rope_parameters": YARN}
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 2880)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 64, 8, 64)
    context, eps = keys.size("max_position_embeddings", 131072), keys.number("rms_norm_eps", 1e-5)
    bias, layers = keys.flag("attention_bias", True), keys.size("num_hidden_layers", 36)
    window = keys.size_or_none("sliding_window", 128)
    attention = Attention(heads, kv_heads, head_dim, sinks=True)
    keys.only("hidden_act", "silu")
    keys.only("swiglu_alpha", 1.702)  # what makes x·σ(α·x) quick_gelu
    keys.raw("initial_context_length"), keys.raw("experts_per_token")  # said again
    expert = replace(
        gated(keys, keys.size("intermediate_size", 2880), "experts_act", "quick_gelu"),
        name="mlp.experts", up_offset=1.0, limit=keys.number("swiglu_limit", 7.0),
    )  # fmt: skip
    mixture = Mixture(
        router(
            keys, "mlp.router", hidden, expert_count(keys, 128), keys.size("num_experts_per_tok", 4),
            bias=True, normalise=True,
        ),
        expert,
    )  # fmt: skip
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[
            replace(attention, window=window if kind == "sliding_attention" else None)
            for kind in layer_types(keys, layers, every(layers, 2))
        ],
        feed_forward=[mixture] * layers,
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context, theta=150_000.0)},
        context=context,
        vocabulary=keys.size("vocab_size", 201088),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
    )
