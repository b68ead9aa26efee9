"""Gemma 2: norms before and after, soft caps of scores and logits, windows in every second layer. Team Gemma 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._gemma import activation, gemma_decoder, soft_cap
from tulle.models.families._parts import every, layer_types, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    head_dim = keys.size("head_dim", 256)
    context, layers = keys.size("max_position_embeddings", 8192), keys.size("num_hidden_layers", 26)
    window = keys.size_or_none("sliding_window", 4096)
    kinds = layer_types(keys, layers, every(layers, 2))
    attention = Attention(
        keys.size("num_attention_heads", 8),
        keys.size("num_key_value_heads", 4),
        head_dim,
        scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=soft_cap(keys, "attn_logit_softcapping", 50.0),
    )
    return gemma_decoder(
        keys,
        attention=attention,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        tables=["default"] * layers,
        rotary={"default": read_rotary(keys, head_dim, context)},
        activation=activation(keys),
        context=context,
        vocabulary=keys.size("vocab_size", 256000),
        logit_soft_cap=soft_cap(keys, "final_logit_softcapping", 30.0),
    )
