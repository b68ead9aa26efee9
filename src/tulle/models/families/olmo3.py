"""OLMo 3: OLMo 2 with windows in three layers of four. OLMo et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._olmo import olmo_decoder, query_norms
from tulle.models.families._parts import every, head_sizes, layer_types, rotary_by_type


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-5)
    layers, window = keys.size("num_hidden_layers", 32), keys.size_or_none("sliding_window", 4096)
    kinds = layer_types(keys, layers, every(layers, 4))
    return olmo_decoder(
        keys,
        hidden=hidden,
        attention=[
            Attention(
                heads, kv_heads, head_dim, rotary=kind, window=window if kind == "sliding_attention" else None,
                **query_norms(eps),
            )
            for kind in kinds
        ],
        rotary=rotary_by_type(keys, head_dim, context, dict.fromkeys(("full_attention", "sliding_attention"), 5e5)),
        context=context,
        eps=eps,
    )  # fmt: skip
