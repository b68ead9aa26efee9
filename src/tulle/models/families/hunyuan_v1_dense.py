"""Hunyuan, dense: Llama with norms of queries and keys after the rotation. Tencent 2025.

Its ``dynamic`` rotary embeddings with ``alpha`` are a fixed stretch of θ: θ·α^(d/(d − 2)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys, positive
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import gated_decoder, head_sizes, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-5)
    bias = keys.flag("attention_bias", False)
    keys.only("use_qk_norm", True)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        q_norm=Norm("self_attn.query_layernorm", eps),
        k_norm=Norm("self_attn.key_layernorm", eps),
        norm_after_rotary=True,
    )
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 11008),
        attention=[attention] * keys.size("num_hidden_layers", 32),
        rotary=_rotary(keys, head_dim, context),
        context=context,
        vocabulary=keys.size("vocab_size", 290943),
        eps=eps,
        qkv_bias=bias,
        o_bias=bias,
    )


def _rotary(keys: ConfigKeys, head_dim: int, context: int) -> Any:
    inside = keys.raw("rope_scaling") or keys.raw("rope_parameters") or {}
    alpha = inside.get("alpha") if isinstance(inside, Mapping) else None
    found = read_rotary(keys, head_dim, context, also=("alpha",))
    if found.kind != "dynamic" or not alpha:
        return found
    theta = found.theta * positive(alpha, "alpha") ** (head_dim / (head_dim - 2))
    return replace(found, kind="default", theta=theta, factor=None)
