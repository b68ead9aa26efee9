"""OLMoE: norms of all queries and keys, and 64 small experts, eight of them per token. Muennighoff et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Mixture, Norm
from tulle.models.families._olmo import query_norms
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
    hidden = keys.size("hidden_size", 2048)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 16)
    context, eps = keys.size("max_position_embeddings", 4096), keys.number("rms_norm_eps", 1e-5)
    bias, layers = keys.flag("attention_bias", False), keys.size("num_hidden_layers", 16)
    keys.only("clip_qkv", None)
    attention = Attention(heads, kv_heads, head_dim, **query_norms(eps))
    expert = gated(keys, keys.size("intermediate_size", 2048))
    mixture = Mixture(
        router(
            keys, "mlp.gate", hidden, expert_count(keys, 64), keys.size("num_experts_per_tok", 8),
            normalise=keys.flag("norm_topk_prob", False),
        ),
        replace(expert, name="mlp.experts"),
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
        vocabulary=keys.size("vocab_size", 50304),
        qkv_bias=bias,
        o_bias=bias,
    )
