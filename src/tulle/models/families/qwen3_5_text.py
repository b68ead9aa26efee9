"""Qwen 3.5 and 3.6, dense, text: three layers of gated delta nets to one of gated attention, a quarter of whose heads'
channels are rotated. Qwen 2026."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, GatedDeltaNet, Norm
from tulle.models.families._parts import Norms, build_decoder, every, gated, layer_types, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    head_dim, eps = keys.size("head_dim", 256), keys.number("rms_norm_eps", 1e-6)
    context, layers = keys.size("max_position_embeddings", 32768), keys.size("num_hidden_layers", 32)
    bias = keys.flag("attention_bias", False)
    q_norm, k_norm = (Norm(f"self_attn.{name}_norm", eps, offset=1.0) for name in "qk")
    attention = Attention(
        keys.size("num_attention_heads", 16),
        keys.size("num_key_value_heads", 4),
        head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        output_gate=True,
    )
    delta = GatedDeltaNet(
        keys.size("linear_num_key_heads", 16),
        keys.size("linear_num_value_heads", 32),
        keys.size("linear_key_head_dim", 128),
        keys.size("linear_value_head_dim", 128),
        keys.size("linear_conv_kernel_dim", 4),
        eps,
    )
    for key, value in (("attn_output_gate", True), ("mamba_ssm_dtype", "float32"), ("mlp_only_layers", [])):
        keys.only(key, value)
    for key in [name for name in config if name.startswith("mtp_")]:
        keys.raw(key)  # of the head for several tokens, which is left out
    default = every(layers, keys.size("full_attention_interval", 4), "linear_attention")
    kinds = layer_types(keys, layers, default, "linear_attention")
    return build_decoder(
        keys,
        hidden=keys.size("hidden_size", 4096),
        attention=[delta if kind == "linear_attention" else attention for kind in kinds],
        feed_forward=gated(keys, keys.size("intermediate_size", 12288)),
        norms=Norms(*(Norm(name, eps, offset=1.0) for name in ("input_layernorm", "post_attention_layernorm"))),
        final_norm=Norm("model.norm", eps, offset=1.0),
        # Sections of positions in pictures: those of a text are all alike.
        rotary={
            "default": read_rotary(keys, head_dim, context, partial=0.25, also=("mrope_section", "mrope_interleaved"))
        },
        context=context,
        vocabulary=keys.size("vocab_size", 248320),
        qkv_bias=bias,
        o_bias=bias,
    )
