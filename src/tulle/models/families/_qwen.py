"""What Qwen's families share: gated delta nets beside attention with gates, which layers have experts, and a shared
expert with a gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, GatedDeltaNet, GatedMLP, Linear, Mixture, Norm
from tulle.models.families._parts import (
    Norms,
    build_decoder,
    every,
    expert_count,
    gated,
    head_sizes,
    layer_types,
    read_rotary,
    router,
)


def hybrid_decoder(
    keys: ConfigKeys,
    *,
    hidden: int,
    layers: int,
    kv_heads: int,
    vocabulary: int,
    feed_forward: Callable[[ConfigKeys, int, int], GatedMLP | list[GatedMLP | Mixture]],
    fused: bool = False,
) -> Decoder:
    """Three layers of gated delta nets to one of gated attention, a quarter of whose heads' channels are rotated.

    Numbers are the family's defaults; ``feed_forward`` is given the width and the number of layers; ``fused``: of
    :class:`tulle.models.description.GatedDeltaNet`.
    """
    hidden = keys.size("hidden_size", hidden)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 16, kv_heads, 256)
    eps = keys.number("rms_norm_eps", 1e-6)
    context, layers = keys.size("max_position_embeddings", 32768), keys.size("num_hidden_layers", layers)
    bias = keys.flag("attention_bias", False)
    q_norm, k_norm = (Norm(f"self_attn.{name}_norm", eps, offset=1.0) for name in "qk")
    attention = Attention(heads, kv_heads, head_dim, q_norm=q_norm, k_norm=k_norm, output_gate=True)
    delta = GatedDeltaNet(
        keys.size("linear_num_key_heads", 16),
        keys.size("linear_num_value_heads", 32),
        keys.size("linear_key_head_dim", 128),
        keys.size("linear_value_head_dim", 128),
        keys.size("linear_conv_kernel_dim", 4),
        eps,
        fused=fused,
    )
    default = every(layers, keys.size("full_attention_interval", 4), "linear_attention")
    kinds = layer_types(keys, layers, default, "linear_attention")
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[delta if kind == "linear_attention" else attention for kind in kinds],
        feed_forward=feed_forward(keys, hidden, layers),
        norms=Norms(*(Norm(name, eps, offset=1.0) for name in ("input_layernorm", "post_attention_layernorm"))),
        final_norm=Norm("model.norm", eps, offset=1.0),
        # Sections of positions in pictures: those of a text are all alike.
        rotary={
            "default": read_rotary(keys, head_dim, context, partial=0.25, also=("mrope_section", "mrope_interleaved"))
        },
        context=context,
        vocabulary=keys.size("vocab_size", vocabulary),
        qkv_bias=bias,
        o_bias=bias,
    )


def skip_unread(keys: ConfigKeys) -> None:
    """Keys of Qwen 3.5 and 3.6 that say what is so anyway, or belong to the head for several tokens, which is left
    out."""
    for key, value in (("attn_output_gate", True), ("mamba_ssm_dtype", "float32"), ("mlp_only_layers", [])):
        keys.only(key, value)
    for key in [name for name in keys.config if name.startswith("mtp_")]:
        keys.raw(key)


def feed_forwards(
    keys: ConfigKeys,
    hidden: int,
    layers: int,
    intermediate: int | None,
    own: int,
    *,
    experts: int,
    chosen: int,
    shared: int | None = None,
    normalise: bool | None = False,
) -> list[GatedMLP | Mixture]:
    """Of all layers. Numbers are the family's defaults: of a dense layer's width (None: there are none), of an expert's
    ``own``, of the ``shared`` one's. ``normalise`` None: always."""
    dense = gated(keys, 1 if intermediate is None else keys.size("intermediate_size", intermediate))
    count = expert_count(keys, experts)
    normalise = True if normalise is None else keys.flag("norm_topk_prob", normalise)
    routing = router(keys, "mlp.gate", hidden, count, keys.size("num_experts_per_tok", chosen), normalise=normalise)
    mixture = Mixture(
        routing,
        replace(dense, intermediate=keys.size("moe_intermediate_size", own), name="mlp.experts"),
        None if shared is None else replace(
            dense, intermediate=keys.size("shared_expert_intermediate_size", shared), name="mlp.shared_expert"
        ),
        None if shared is None else Linear("mlp.shared_expert_gate", (1, hidden)),
    )  # fmt: skip
    if intermediate is None:
        return [mixture] * layers
    step, without = keys.size("decoder_sparse_step", 1), keys.raw("mlp_only_layers", None) or []
    if not isinstance(without, list):
        raise keys.refused("mlp_only_layers", "a list of layers", without)
    return [dense if index in without or (index + 1) % step else mixture for index in range(layers)]
