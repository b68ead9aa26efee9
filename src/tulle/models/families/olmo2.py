"""OLMo 2: norms after attention and feed-forward instead of before, and of all queries and keys. OLMo et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._olmo import olmo_decoder, query_norms
from tulle.models.families._parts import head_sizes, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-5)
    attention = Attention(heads, kv_heads, head_dim, **query_norms(eps))
    rotary = read_rotary(keys, head_dim, context)
    return olmo_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 32),
        rotary={"default": rotary},
        context=context,
        eps=eps,
    )
