"""ERNIE 4.5, dense: Llama with neighbouring channels rotated together and optional biases. Baidu 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 1024)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 16, kv_heads=2, head_dim=128)
    context, bias = keys.size("max_position_embeddings", 131072), keys.raw("use_bias", False) or False
    if not isinstance(bias, bool):
        raise keys.refused("use_bias", "true or false", bias)
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 3072),
        attention=[Attention(heads, kv_heads, head_dim)] * keys.size("num_hidden_layers", 18),
        rotary=read_rotary(keys, head_dim, context, theta=5e5, interleaved=True),
        context=context,
        vocabulary=keys.size("vocab_size", 103424),
        eps=keys.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tied=True,
    )
