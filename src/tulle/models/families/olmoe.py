"""OLMoE: norms of all queries and keys, and 64 small experts, eight of them per token. Muennighoff et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._olmo import query_norms
from tulle.models.families._parts import gated_decoder, head_sizes, mixture, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 2048)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 16)
    context, eps = keys.size("max_position_embeddings", 4096), keys.number("rms_norm_eps", 1e-5)
    bias = keys.flag("attention_bias", False)
    keys.only("clip_qkv", None)
    attention = Attention(heads, kv_heads, head_dim, **query_norms(eps))
    return gated_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 16),
        mixture=mixture(keys, "mlp", hidden, 2048, 64, 8, normalise=keys.flag("norm_topk_prob", False)),
        rotary=read_rotary(keys, head_dim, context),
        eps=eps,
        context=context,
        vocabulary=keys.size("vocab_size", 50304),
        qkv_bias=bias,
        o_bias=bias,
    )
