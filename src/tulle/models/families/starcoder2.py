"""StarCoder 2: layer norms, a feed-forward without gate, biases everywhere, a window. Lozhkov et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Attention, Decoder, Norm, PlainMLP
from tulle.models.families._parts import Norms, build_decoder, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 3072), keys.size("num_attention_heads", 24)
    head_dim = keys.size("head_dim", None, null=hidden // heads)
    context, eps = keys.size("max_position_embeddings", 4096), keys.number("norm_epsilon", 1e-5)
    bias = keys.flag("use_bias", True)
    for key, value in (("norm_type", "layer_norm"), ("mlp_type", "default"), ("activation_function", "gelu")):
        keys.only(key, value)  # notes of the training's config, which transformers does not read
    for key in ("residual_dropout", "embedding_dropout"):
        keys.raw(key)  # only in training
    attention = Attention(
        heads, keys.size("num_key_value_heads", 2), head_dim, window=keys.size_or_none("sliding_window", None)
    )
    activation = keys.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS)
    norms = (Norm(name, eps, "layer", bias=True) for name in ("input_layernorm", "post_attention_layernorm"))
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 30),
        feed_forward=PlainMLP(keys.size("intermediate_size", 12288), activation),
        norms=Norms(*norms),
        final_norm=Norm("model.norm", eps, "layer", bias=True),
        rotary={"default": read_rotary(keys, head_dim, context)},
        context=context,
        vocabulary=keys.size("vocab_size", 49152),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        names={"up_proj": "c_fc", "down_proj": "c_proj"},
        tied=True,
    )
