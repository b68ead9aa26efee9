"""Granite 3 and 4, dense: Llama with four factors, of embedding, scores, logits and what is added to the stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, bias = keys.size("max_position_embeddings", 2048), keys.flag("attention_bias", False)
    attention = Attention(heads, kv_heads, head_dim, scale=keys.number("attention_multiplier", 1.0))
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 11008),
        attention=[attention] * keys.size("num_hidden_layers", 32),
        rotary=read_rotary(keys, head_dim, context),
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        residual_scale=keys.number("residual_multiplier", 1.0),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=1 / keys.number("logits_scaling", 1.0),
    )
