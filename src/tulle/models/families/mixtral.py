"""Mixtral: Mistral with eight large experts, two of them per token. Jiang et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Mixture, Norm
from tulle.models.families._parts import (
    build_decoder,
    expert_count,
    gated,
    head_sizes,
    llama_norms,
    read_rotary,
    router,
)


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32, 8)
    context, eps = keys.size("max_position_embeddings", 131072), keys.number("rms_norm_eps", 1e-5)
    keys.raw("router_jitter_noise")  # of training
    attention = Attention(heads, kv_heads, head_dim, window=keys.size_or_none("sliding_window", None))
    layers = keys.size("num_hidden_layers", 32)
    expert = gated(keys, keys.size("intermediate_size", 14336))
    mixture = Mixture(
        router(
            keys, "block_sparse_moe.gate", hidden, expert_count(keys, 8),
            keys.size("num_experts_per_tok", 2), normalise=True,
        ),
        replace(expert, name="block_sparse_moe.experts"),
    )  # fmt: skip
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * layers,
        feed_forward=[mixture] * layers,
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context)},
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        names={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    )
