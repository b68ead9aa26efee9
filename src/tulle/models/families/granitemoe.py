"""Granite 3 with experts: Granite's four factors, and experts whose weights stand in one tensor."""

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
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-6)
    bias, layers = keys.flag("attention_bias", False), keys.size("num_hidden_layers", 32)
    attention = Attention(heads, kv_heads, head_dim, scale=keys.number("attention_multiplier", 1.0))
    expert = gated(keys, keys.size("intermediate_size", 11008))
    mixture = Mixture(
        router(
            keys, "block_sparse_moe.router.layer", hidden, expert_count(keys, 8),
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
        qkv_bias=bias,
        o_bias=bias,
        residual_scale=keys.number("residual_multiplier", 1.0),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=1 / keys.number("logits_scaling", 1.0),
    )
