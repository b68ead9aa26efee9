"""Arcee AFM: Llama with a feed-forward of squared ReLU without gate. Arcee 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Attention, Decoder, Norm, PlainMLP
from tulle.models.families._parts import build_decoder, head_sizes, llama_norms, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 2560)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 4096), keys.number("rms_norm_eps", 1e-5)
    bias = keys.flag("attention_bias", False)
    activation = keys.choice("hidden_act", "relu2", ACTIVATIONS)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[Attention(heads, kv_heads, head_dim)] * keys.size("num_hidden_layers", 32),
        feed_forward=PlainMLP(keys.size("intermediate_size", 18432), activation),
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context)},
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
    )
