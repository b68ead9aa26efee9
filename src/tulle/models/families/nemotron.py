"""Nemotron 4 and Minitron: layer norms of 1 + w, a feed-forward of squared ReLU without gate, half of a head's channels
rotated. Parmar et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Attention, Decoder, Norm, PlainMLP
from tulle.models.families._parts import Norms, build_decoder, head_sizes, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 6144)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 48)
    context, eps = keys.size("max_position_embeddings", 4096), keys.number("norm_eps", 1e-5)
    bias, mlp_bias = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    activation = keys.choice("hidden_act", "relu2", ACTIVATIONS)
    norms = (
        Norm(name, eps, "layer", offset=1.0, bias=True) for name in ("input_layernorm", "post_attention_layernorm")
    )
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[Attention(heads, kv_heads, head_dim)] * keys.size("num_hidden_layers", 32),
        feed_forward=PlainMLP(keys.size("intermediate_size", 24576), activation),
        norms=Norms(*norms),
        final_norm=Norm("model.norm", eps, "layer", offset=1.0, bias=True),
        rotary={"default": read_rotary(keys, head_dim, context, partial=0.5)},
        context=context,
        vocabulary=keys.size("vocab_size", 256000),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=mlp_bias,
    )
