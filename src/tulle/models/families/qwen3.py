"""Qwen 3 dense: norms over head_dim of queries and keys, head_dim 128 whatever the width. Yang et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import gated_decoder, read_rotary, windows


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    heads = keys.size("num_attention_heads", 32)
    kv_heads = keys.size("num_key_value_heads", 32, null=heads)
    head_dim = keys.size("head_dim", 128)
    context = keys.size("max_position_embeddings", 32768)
    eps = keys.number("rms_norm_eps", 1e-6)
    bias = keys.flag("attention_bias", False)
    keys.only("mlp_bias", False)
    q_norm, k_norm = Norm("self_attn.q_norm", eps), Norm("self_attn.k_norm", eps)
    layers = keys.size("num_hidden_layers", 32)
    return gated_decoder(
        keys,
        hidden=keys.size("hidden_size", 4096),
        intermediate=keys.size("intermediate_size", 22016),
        attention=[
            Attention(heads, kv_heads, head_dim, q_norm=q_norm, k_norm=k_norm, window=w) for w in windows(keys, layers)
        ],
        rotary=read_rotary(keys, head_dim, context),
        context=context,
        vocabulary=keys.size("vocab_size", 151936),
        eps=eps,
        qkv_bias=bias,
        o_bias=bias,
    )
