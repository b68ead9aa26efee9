"""BitNet b1.58 2B4T: squared ReLU, and norms before the last linears of attention and feed-forward. Ma et al. 2025.

Its checkpoints name their online quantiser in ``quantization_config``, which :mod:`tulle.models.foreign` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Attention, Decoder, GatedMLP, Norm
from tulle.models.families._parts import build_decoder, llama_norms, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 2560), keys.size("num_attention_heads", 20)
    kv_heads = keys.size("num_key_value_heads", 5, null=heads)
    head_dim = hidden // heads
    keys.only("head_dim", head_dim)  # the norm before o is as wide as the stream
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-5)
    bias = keys.flag("attention_bias", False)
    attention = Attention(heads, kv_heads, head_dim, output_norm=Norm("self_attn.attn_sub_norm", eps))
    feed_forward = GatedMLP(
        keys.size("intermediate_size", 6912),
        keys.choice("hidden_act", "relu2", ACTIVATIONS),
        inner_norm=Norm("mlp.ffn_sub_norm", eps),
    )
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 30),
        feed_forward=feed_forward,
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context, theta=5e5)},
        context=context,
        vocabulary=keys.size("vocab_size", 128256),
        qkv_bias=bias,
        o_bias=bias,
    )
