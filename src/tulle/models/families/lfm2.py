"""LFM2, dense: gated short convolutions, with attention in some layers. Liquid AI 2025, "LFM2 Technical Report"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, GatedMLP, Norm, ShortConvolution
from tulle.models.families._parts import Norms, build_decoder, head_sizes, layer_types, read_rotary

SAID_TWICE = {
    "block_dim": "hidden_size",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "num_heads": "num_attention_heads",
    "theta": "rope_theta",
    "block_norm_eps": "norm_eps",
}
"""Keys of the first files that say again what others say, and those others."""
TRAINING = ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "o_proj": "out_proj"}


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, layers = keys.size("hidden_size", 2560), keys.size("num_hidden_layers", 32)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32, 8)
    eps, context = keys.number("norm_eps", 1e-5), keys.size("max_position_embeddings", 128_000)
    q_norm, k_norm = (Norm(f"self_attn.{letter}_layernorm", eps) for letter in "qk")
    attention = Attention(heads, kv_heads, head_dim, q_norm=q_norm, k_norm=k_norm)
    bias = keys.flag("conv_bias", False)
    convolution = ShortConvolution(hidden, keys.size("conv_L_cache", 3), bias)
    with_attention = keys.raw("full_attn_idxs")
    default = ["full_attention" if with_attention is None or i in with_attention else "conv" for i in range(layers)]
    skip_unread(keys)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[convolution if kind == "conv" else attention for kind in layer_types(keys, layers, default, "conv")],
        feed_forward=GatedMLP(width(keys), "silu", "feed_forward"),
        norms=Norms(Norm("operator_norm", eps), Norm("ffn_norm", eps)),
        final_norm=Norm("model.embedding_norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context, theta=1_000_000.0)},
        context=context,
        vocabulary=keys.size("vocab_size", 65536),
        names=NAMES,
        tied=keys.flag("tie_embedding", True),
    )


def width(keys: ConfigKeys) -> int:
    """Of the feed-forward: ``intermediate_size``, or two thirds of it, scaled and rounded up, as files say."""
    found = keys.size("intermediate_size", 12288)
    if "block_ff_dim" in keys.config:
        found = keys.size("block_ff_dim", None)
    factor, multiple = keys.number("block_ffn_dim_multiplier", 1.0), keys.size("block_multiple_of", 256)
    if not keys.flag("block_auto_adjust_ff_dim", True):
        return found
    return -(-int(factor * int(2 * found / 3)) // multiple) * multiple


def skip_unread(keys: ConfigKeys) -> None:
    """Keys of the first files that say what is so anyway."""
    for key, other in SAID_TWICE.items():
        keys.raw(key)
        if other in keys.config:
            keys.only(key, keys.config[other])
    for key in ("block_use_swiglu", "use_pos_enc"):
        keys.only(key, True)
    for key in TRAINING:
        keys.raw(key)
