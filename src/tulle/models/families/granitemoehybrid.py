"""Granite 4 with Mamba-2: attention in some layers, as a rule without positions; Granite's four factors; a shared MLP
and, in some models, experts beside it. IBM 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys, same
from tulle.models.description import Attention, Decoder, GatedMLP, Mamba2, Mixture, Norm
from tulle.models.families._parts import (
    build_decoder,
    expert_count,
    gated,
    head_sizes,
    layer_types,
    llama_norms,
    read_rotary,
    router,
    step_limits,
)

SHARED = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
"""The shared MLP's linears."""


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, layers = keys.size("hidden_size", 4096), keys.size("num_hidden_layers", 32)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32)
    context, eps = keys.size("max_position_embeddings", 2048), keys.number("rms_norm_eps", 1e-6)
    bias = keys.flag("attention_bias", False)
    kinds = layer_types(keys, layers, ["linear_attention"] * layers, "linear_attention")
    keys.only("position_embedding_type", None, "nope", "rope")
    positions = {"default": read_rotary(keys, head_dim, context)}
    if keys.raw("position_embedding_type") != "rope":
        positions = {}
    attention = Attention(
        heads, kv_heads, head_dim, rotary="default" if positions else None,
        scale=keys.number("attention_multiplier", 1.0),
    )  # fmt: skip
    recurrent = mamba(keys, hidden, eps)
    keys.only("normalization_function", "rmsnorm")
    keys.raw("init_method")  # matters only in training
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[recurrent if kind == "linear_attention" else attention for kind in kinds],
        feed_forward=[feed_forward(keys, hidden)] * layers,
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary=positions,
        context=context,
        vocabulary=keys.size("vocab_size", 32000),
        qkv_bias=bias,
        o_bias=bias,
        names=SHARED if no_experts(keys) else None,
        shared_names=SHARED,
        fused=("gate_up",),
        residual_scale=keys.number("residual_multiplier", 1.0),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        logit_scale=1 / keys.number("logits_scaling", 1.0),
    )


def mamba(keys: ConfigKeys, hidden: int, eps: float) -> Mamba2:
    width, heads = keys.size("mamba_expand", 2) * hidden, keys.size("mamba_n_heads", 128)
    head_dim = width // heads
    if keys.raw("mamba_d_head", "auto") != "auto":
        head_dim = keys.size("mamba_d_head", None)
    if heads * head_dim != width:
        raise keys.refused("mamba_d_head", f"mamba_expand times hidden_size ({width}) over mamba_n_heads", head_dim)
    groups = keys.size("mamba_n_groups", 1)
    if heads % groups:
        raise keys.refused("mamba_n_groups", f"a divisor of mamba_n_heads ({heads})", groups)
    keys.raw("mamba_chunk_size")  # how the work is cut
    return Mamba2(
        heads, head_dim, groups, keys.size("mamba_d_state", 256), keys.size("mamba_d_conv", 4), eps,
        gated(keys, 1).activation,
        bias=keys.flag("mamba_proj_bias", False),
        convolution_bias=keys.flag("mamba_conv_bias", True),
        step_limits=step_limits(keys),
    )  # fmt: skip


def no_experts(keys: ConfigKeys) -> bool:
    return same(keys.raw("num_local_experts", 8), 0)


def feed_forward(keys: ConfigKeys, hidden: int) -> GatedMLP | Mixture:
    activation = gated(keys, 1).activation
    shared = GatedMLP(keys.size("shared_intermediate_size", 1024), activation, "shared_mlp")
    if no_experts(keys):
        keys.raw("num_experts_per_tok")
        keys.raw("intermediate_size")  # of an expert
        return shared
    chosen = keys.size("num_experts_per_tok", 2)
    routing = router(
        keys, "block_sparse_moe.router.layer", hidden, expert_count(keys, 8), chosen, normalise=True
    )  # fmt: skip
    expert = GatedMLP(keys.size("intermediate_size", 11008), activation, "block_sparse_moe.experts")
    return Mixture(routing, expert, shared)
