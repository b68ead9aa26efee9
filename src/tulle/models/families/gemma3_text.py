"""Gemma 3, text: five layers with a window to one without, a rotary table for each kind, norms of queries and keys.
Team Gemma 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._gemma import activation, gemma_decoder, soft_cap
from tulle.models.families._parts import every, layer_types, rotary_by_type

PATTERN = 6
"""Every so many layers one has no window."""


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    head_dim, eps = keys.size("head_dim", 256), keys.number("rms_norm_eps", 1e-6)
    context, layers = keys.size("max_position_embeddings", 131072), keys.size("num_hidden_layers", 26)
    window = keys.size_or_none("sliding_window", 4096)
    pattern = keys.size("sliding_window_pattern", PATTERN, null=PATTERN)
    kinds = layer_types(keys, layers, every(layers, pattern))
    attention = Attention(
        keys.size("num_attention_heads", 8),
        keys.size("num_key_value_heads", 4),
        head_dim,
        q_norm=Norm("self_attn.q_norm", eps, offset=1.0),
        k_norm=Norm("self_attn.k_norm", eps, offset=1.0),
        scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
    )
    keys.raw("_sliding_window_pattern")  # what transformers writes beside layer_types, and does not read
    # transformers' class takes the key and leaves it without effect.
    keys.only("attn_logit_softcapping", None)
    return gemma_decoder(
        keys,
        attention=attention,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        tables=kinds,
        rotary=rotary_by_type(
            keys, head_dim, context, {"full_attention": 1e6, "sliding_attention": 1e4}, local="rope_local_base_freq"
        ),
        activation=activation(keys),
        context=context,
        vocabulary=keys.size("vocab_size", 262208),
        logit_soft_cap=soft_cap(keys, "final_logit_softcapping", None),
    )
