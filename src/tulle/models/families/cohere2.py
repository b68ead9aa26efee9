"""Command R7B (Cohere 2): attention and feed-forward side by side, layer norms without bias, neighbouring channels
rotated together, and only in layers with a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import Norms, build_decoder, every, gated, head_sizes, layer_types, read_rotary

NOTES = {
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1, 1.0),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (True,),
    "use_qk_norm": (False,),
}
"""Keys that describe what the family is, with the values that say so; transformers does not read them."""


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 8192)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 64)
    context, layers = keys.size("max_position_embeddings", 8192), keys.size("num_hidden_layers", 40)
    eps, bias = keys.number("layer_norm_eps", 1e-5), keys.flag("attention_bias", False)
    window, pattern = keys.size_or_none("sliding_window", 4096), keys.size("sliding_window_pattern", 4)
    kinds = layer_types(keys, layers, every(layers, pattern))
    for key, values in NOTES.items():
        keys.only(key, *values)
    keys.only("layer_switch", pattern)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[
            Attention(heads, kv_heads, head_dim, rotary="default", window=window)
            if kind == "sliding_attention" and window is not None
            else Attention(heads, kv_heads, head_dim, rotary=None)
            for kind in kinds
        ],
        feed_forward=gated(keys, keys.size("intermediate_size", 22528)),
        norms=Norms(Norm("input_layernorm", eps, "layer")),
        final_norm=Norm("model.norm", eps, "layer"),
        rotary={"default": read_rotary(keys, head_dim, context, interleaved=True)},
        context=context,
        vocabulary=keys.size("vocab_size", 256000),
        qkv_bias=bias,
        o_bias=bias,
        parallel=True,
        tied=True,
        logit_scale=keys.number("logit_scale", 0.0625),
    )
