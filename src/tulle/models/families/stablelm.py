"""StableLM 2: layer norms, a quarter of a head's channels rotated, optionally attention and feed-forward side by side.
Bellagente et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._parts import Norms, build_decoder, gated, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, heads = keys.size("hidden_size", 2560), keys.size("num_attention_heads", 32)
    head_dim = hidden // heads
    keys.only("head_dim", head_dim)
    keys.only("qk_layernorm", False)  # a norm of its own for every head, which is not written yet
    context, eps = keys.size("max_position_embeddings", 4096), keys.number("layer_norm_eps", 1e-5)
    parallel = keys.flag("use_parallel_residual", False)
    before, after = (Norm(name, eps, "layer", bias=True) for name in ("input_layernorm", "post_attention_layernorm"))
    attention = Attention(heads, keys.size("num_key_value_heads", 32), head_dim)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * keys.size("num_hidden_layers", 32),
        feed_forward=gated(keys, keys.size("intermediate_size", 6912)),
        norms=Norms(before, None if parallel else after),
        final_norm=Norm("model.norm", eps, "layer", bias=True),
        rotary={"default": read_rotary(keys, head_dim, context, partial=0.25)},
        context=context,
        vocabulary=keys.size("vocab_size", 50304),
        qkv_bias=keys.flag("use_qkv_bias", False),
        parallel=parallel,
    )
