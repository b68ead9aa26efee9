"""Qwen 2 and 2.5: Llama with biases of q, k and v, always, and optional windows. Yang et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, read_rotary, windows


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    kv_heads = keys.size("num_key_value_heads", 32, null=heads)
    head_dim = keys.size("head_dim", hidden // heads)
    context = keys.size("max_position_embeddings", 32768)
    keys.only("mlp_bias", False)
    layers = keys.size("num_hidden_layers", 32)
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 22016),
        attention=[Attention(heads, kv_heads, head_dim, window=w) for w in windows(keys, layers)],
        rotary=read_rotary(keys, head_dim, context),
        context=context,
        vocabulary=keys.size("vocab_size", 151936),
        eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=True,
    )
