"""GLM-4 (0414): four norms per layer, half of a head's channels rotated in neighbouring pairs, gate and up in one
tensor. GLM et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import Norms, build_decoder, gated, read_rotary

NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    head_dim = keys.size("head_dim", 128)
    context, eps = keys.size("max_position_embeddings", 131072), keys.number("rms_norm_eps", 1.5625e-7)
    attention = Attention(keys.size("num_attention_heads", 32), keys.size("num_key_value_heads", 2), head_dim)
    return build_decoder(
        keys,
        hidden=keys.size("hidden_size", 4096),
        attention=[attention] * keys.size("num_hidden_layers", 40),
        feed_forward=gated(keys, keys.size("intermediate_size", 13696)),
        norms=Norms(*(Norm(name, eps) for name in NORMS)),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context, partial=0.5, interleaved=True)},
        context=context,
        vocabulary=keys.size("vocab_size", 151552),
        qkv_bias=keys.flag("attention_bias", True),
        fused=("gate_up",),
    )
