"""SmolLM3: Llama with every fourth layer's queries and keys not rotated. Bakouch et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, layer_types, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 2048)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 16, kv_heads=4)
    context, layers = keys.size("max_position_embeddings", 32768), keys.size("num_hidden_layers", 36)
    bias = keys.flag("attention_bias", False)
    rotated = _rotated(keys, layers)
    window = keys.size_or_none("sliding_window", None) if keys.flag("use_sliding_window", False) else None
    keys.raw("sliding_window")  # without effect, where it is not used
    default = ["full_attention" if window is None or r else "sliding_attention" for r in rotated]
    kinds = layer_types(keys, layers, default)
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 11008),
        attention=[
            Attention(
                heads, kv_heads, head_dim, rotary="default" if turned else None,
                window=window if kind == "sliding_attention" else None,
            )
            for turned, kind in zip(rotated, kinds, strict=True)
        ],
        rotary=read_rotary(keys, head_dim, context, theta=2e6),
        context=context,
        vocabulary=keys.size("vocab_size", 128256),
        eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        tied=True,
    )  # fmt: skip


def _rotated(keys: ConfigKeys, layers: int) -> list[bool]:
    """Whether a layer rotates: ``no_rope_layers`` holds 1 where it does, in spite of its name."""
    found, every = keys.raw("no_rope_layers", None), keys.size("no_rope_layer_interval", 4)
    if found is None:
        return [(index + 1) % every != 0 for index in range(layers)]
    if not isinstance(found, list) or len(found) != layers or not all(x in (0, 1) for x in found):
        raise keys.refused("no_rope_layers", f"a list of {layers} times 0 or 1", found)
    return [bool(x) for x in found]
