"""Apertus: a feed-forward without gate whose activation xIELU has two learned numbers, norms of queries and keys.
Apertus 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Attention, Decoder, Norm, PlainMLP
from tulle.models.families._parts import Norms, build_decoder, head_sizes, read_rotary

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
"""Rotary parameters of a config that gives none."""


def describe(config: Mapping[str, Any]) -> Decoder:
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config = {**config, "rope_parameters": LLAMA3}
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 65536), keys.number("rms_norm_eps", 1e-5)
    bias = keys.flag("attention_bias", False)
    for key, value in (("post_norm", False), ("qk_norm", True), ("mlp_bias", False)):
        keys.only(key, value)  # notes of the training's config, which transformers does not read
    attention = Attention(
        heads, kv_heads, head_dim, q_norm=Norm("self_attn.q_norm", eps), k_norm=Norm("self_attn.k_norm", eps)
    )
    activation = keys.choice("hidden_act", "xielu", {**ACTIVATIONS, "xielu": "xielu"})
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 32),
        feed_forward=PlainMLP(keys.size("intermediate_size", 14336), activation),
        norms=Norms(Norm("attention_layernorm", eps), Norm("feedforward_layernorm", eps)),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context, theta=12e6)},
        context=context,
        vocabulary=keys.size("vocab_size", 131072),
        qkv_bias=bias,
        o_bias=bias,
    )
