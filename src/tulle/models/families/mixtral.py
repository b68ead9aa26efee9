"""Mixtral: Mistral with eight large experts, two of them per token. Jiang et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, mixture, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32, 8)
    context, eps = keys.size("max_position_embeddings", 131072), keys.number("rms_norm_eps", 1e-5)
    keys.raw("router_jitter_noise")  # of training
    attention = Attention(heads, kv_heads, head_dim, window=keys.size_or_none("sliding_window", None))
    return gated_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 32),
        mixture=mixture(keys, "block_sparse_moe", hidden, 14336, 8, 2, normalise=True),
        rotary=read_rotary(keys, head_dim, context),
        eps=eps,
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        names={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    )
