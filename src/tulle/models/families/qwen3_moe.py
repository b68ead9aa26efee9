"""Qwen 3 with experts: Qwen 3's attention, and of many small experts a few per token. Yang et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import build_decoder, head_sizes, llama_norms, read_rotary
from tulle.models.families._qwen import feed_forwards


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 2048)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32, 4)
    context, eps = keys.size("max_position_embeddings", 32768), keys.number("rms_norm_eps", 1e-6)
    layers, bias = keys.size("num_hidden_layers", 24), keys.flag("attention_bias", False)
    window = keys.size_or_none("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    keys.raw("sliding_window"), keys.raw("max_window_layers")  # the window is that of all layers, or of none
    attention = Attention(
        heads, kv_heads, head_dim, window=window, q_norm=Norm("self_attn.q_norm", eps),
        k_norm=Norm("self_attn.k_norm", eps),
    )  # fmt: skip
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * layers,
        feed_forward=feed_forwards(keys, hidden, layers, 6144, 768, experts=128, chosen=8),
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context)},
        context=context,
        vocabulary=keys.size("vocab_size", 151936),
        qkv_bias=bias,
        o_bias=bias,
    )
