"""Seed-OSS: Llama with heads of 128, biases of q, k and v, and a switch of its own for o's. ByteDance 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 80)
    head_dim = keys.size("head_dim", 128, null=hidden // heads)
    attention = Attention(heads, keys.size("num_key_value_heads", 8, null=heads), head_dim)
    context = keys.size("max_position_embeddings", 524288)
    keys.raw("residual_dropout")  # matters only in training
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 27648),
        attention=[attention] * keys.size("num_hidden_layers", 64),
        rotary=read_rotary(keys, head_dim, context),
        context=context,
        vocabulary=keys.size("vocab_size", 155136),
        eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=keys.flag("attention_bias", True),
        o_bias=keys.flag("attention_out_bias", False),
        mlp_bias=keys.flag("mlp_bias", False),
    )
