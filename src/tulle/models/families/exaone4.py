"""EXAONE 4: norms after attention and feed-forward, norms of queries and keys, and layers without window that do not
rotate. Bae et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import build_decoder, every, gated, layer_types, norms_after, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    kv_heads = keys.size("num_key_value_heads", 32)
    head_dim = keys.size("head_dim", None, null=hidden // heads)
    context, layers = keys.size("max_position_embeddings", 2048), keys.size("num_hidden_layers", 32)
    eps, window = keys.number("rms_norm_eps", 1e-5), keys.size_or_none("sliding_window", 4096)
    kinds = layer_types(keys, layers, _pattern(keys, layers, window))
    q_norm, k_norm = Norm("self_attn.q_norm", eps), Norm("self_attn.k_norm", eps)
    attention = []
    for kind in kinds:
        slides = kind == "sliding_attention"
        rotary = "default" if slides or window is None else None
        attention.append(
            Attention(
                heads, kv_heads, head_dim, rotary=rotary, q_norm=q_norm, k_norm=k_norm,
                window=window if slides else None,
            )
        )  # fmt: skip
    return build_decoder(
        keys,
        hidden=hidden,
        attention=attention,
        feed_forward=gated(keys, keys.size("intermediate_size", 16384)),
        norms=norms_after(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context)},
        context=context,
        vocabulary=keys.size("vocab_size", 102400),
    )


def _pattern(keys: ConfigKeys, layers: int, window: int | None) -> list[str]:
    """Kinds of layers by ``sliding_window_pattern``: every so many layers, one has no window."""
    pattern = keys.raw("sliding_window_pattern", 4)
    if window is None:
        return ["full_attention"] * layers
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return ["sliding_attention" if pattern[i % len(pattern)] == "L" else "full_attention" for i in range(layers)]
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        raise keys.refused("sliding_window_pattern", "a positive whole number, or letters L and G", pattern)
    return every(layers, pattern)
