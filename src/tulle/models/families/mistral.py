"""Mistral: Llama with a sliding window over all layers, or none. Jiang et al. 2023."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    kv_heads = keys.size("num_key_value_heads", 8)
    head_dim = keys.size("head_dim", None, null=hidden // heads)
    context = keys.size("max_position_embeddings", 131072)
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    attention = Attention(heads, kv_heads, head_dim, window=keys.size_or_none("sliding_window", 4096))
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 14336),
        attention=[attention] * keys.size("num_hidden_layers", 32),
        rotary=read_rotary(keys, head_dim, context),
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        eps=keys.number("rms_norm_eps", 1e-6),
    )
