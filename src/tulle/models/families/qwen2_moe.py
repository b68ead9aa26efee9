"""Qwen 1.5 and 2 with experts: Qwen 2's attention, small experts and a shared one with a gate. Yang et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import build_decoder, head_sizes, layer_types, llama_norms, read_rotary
from tulle.models.families._qwen import feed_forwards


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 2048)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 16, 16)
    context, eps = keys.size("max_position_embeddings", 32768), keys.number("rms_norm_eps", 1e-6)
    layers = keys.size("num_hidden_layers", 24)
    window = keys.size_or_none("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    keys.raw("sliding_window")  # without effect, where it is not used
    last = keys.size("max_window_layers", 28)
    # Every other layer below max_window_layers.
    slides = [window is not None and index % 2 == 0 and index < last for index in range(layers)]
    default = ["sliding_attention" if one else "full_attention" for one in slides]
    kinds = layer_types(keys, layers, default)
    if window is None and "sliding_attention" in kinds:
        expected = "full_attention without sliding_window and use_sliding_window"
        raise keys.refused("layer_types", expected, "sliding_attention")
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[
            Attention(heads, kv_heads, head_dim, window=window if kind == "sliding_attention" else None)
            for kind in kinds
        ],
        feed_forward=feed_forwards(keys, hidden, layers, 5632, 1408, experts=60, chosen=4, shared=5632),
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context)},
        context=context,
        vocabulary=keys.size("vocab_size", 151936),
        qkv_bias=keys.flag("qkv_bias", True),
    )
