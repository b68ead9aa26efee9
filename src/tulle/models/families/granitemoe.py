"""Granite 3 with experts: Granite's four factors, and experts whose weights stand in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, mixture, read_rotary

ROUTER = "block_sparse_moe.router.layer"


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-6)
    bias = keys.flag("attention_bias", False)
    attention = Attention(heads, kv_heads, head_dim, scale=keys.number("attention_multiplier", 1.0))
    return gated_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 32),
        mixture=mixture(keys, "block_sparse_moe", hidden, 11008, 8, 2, gate=ROUTER, normalise=True),
        rotary=read_rotary(keys, head_dim, context),
        eps=eps,
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        qkv_bias=bias,
        o_bias=bias,
        residual_scale=keys.number("residual_multiplier", 1.0),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=1 / keys.number("logits_scaling", 1.0),
    )
