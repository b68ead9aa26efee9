"""Phi-3 and Phi-4: Llama with queries, keys and values in one tensor, gate and up in another, longrope. Abdin et al.
2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    # The length of the first training stands beside the table's parameters, and is 4096 where it is missing.
    keys = ConfigKeys({"original_max_position_embeddings": 4096, **config})
    hidden = keys.size("hidden_size", 3072)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context = keys.size("max_position_embeddings", 4096)
    for key in ("attention_bias", "mlp_bias"):
        keys.only(key, False)
    keys.only("lm_head_bias", False)
    rotary = read_rotary(keys, head_dim, context, partial=1.0)
    if rotary.kind not in ("default", "longrope"):
        raise keys.refused("rope_type", "default or longrope", rotary.kind)
    attention = Attention(heads, kv_heads, head_dim, window=keys.size_or_none("sliding_window", None))
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 8192),
        attention=[attention] * keys.size("num_hidden_layers", 32),
        rotary=rotary,
        context=context,
        vocabulary=keys.size("vocab_size", 32064),
        eps=keys.number("rms_norm_eps", 1e-5),
        fused=("qkv", "gate_up"),
    )
