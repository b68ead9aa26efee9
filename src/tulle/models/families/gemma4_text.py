"""Gemma 4, text: five layers with a window to one without, whose heads are wider and rotated in part; norms of queries,
keys and values. The small models give every layer an input of its own of each token, and their last layers attend to
the keys and values of earlier ones. One model has experts beside every feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import (
    Attention,
    Decoder,
    GatedMLP,
    InputGate,
    Linear,
    Mixture,
    Norm,
    PerLayerEmbedding,
    Rotary,
    Router,
)
from tulle.models.families._gemma import activation, soft_cap
from tulle.models.families._parts import Norms, build_decoder, every, layer_types, rotary_of

PATTERN = 6
"""Every so many layers one has no window."""
ROTARY: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
"""Tables of a config that says nothing of them."""


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden, eps = keys.size("hidden_size", 2304), keys.number("rms_norm_eps", 1e-6)
    layers, context = keys.size("num_hidden_layers", 30), keys.size("max_position_embeddings", 131072)
    vocabulary = keys.size("vocab_size", 262144)
    keys.only("use_bidirectional_attention", None, "vision")
    for key in ("rope_scaling", "partial_rotary_factor"):
        keys.only(key, None)
    # transformers makes the last layer one without a window, whatever the config says.
    kinds = [*layer_types(keys, layers, every(layers, PATTERN))[:-1], "full_attention"]
    attention = _attention(keys, kinds, eps)
    sizes = {kind: mixer.head_dim for kind, mixer in zip(kinds, attention, strict=True)}
    act, narrow = activation(keys), keys.raw("hidden_size_per_layer_input", 256)
    keys.raw("vocab_size_per_layer_input")  # matters with inputs by layer alone
    names = ("input", "pre_feedforward", "post_attention", "post_feedforward")
    bias = keys.flag("attention_bias", False)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=attention,
        feed_forward=_feed_forwards(keys, hidden, attention, act, eps),
        norms=Norms(*(Norm(f"{name}_layernorm", eps) for name in names)),
        final_norm=Norm("model.norm", eps),
        rotary={kind: _rotary(keys, kind, size, context) for kind, size in sizes.items()},
        context=context,
        vocabulary=vocabulary,
        qkv_bias=bias,
        o_bias=bias,
        input_gate=InputGate(narrow, act, Norm("post_per_layer_input_norm", eps)) if narrow else None,
        output_scale="layer_scalar",
        tied=True,
        embedding_scale=hidden**0.5,
        logit_soft_cap=soft_cap(keys, "final_logit_softcapping", None),
        per_layer=_per_layer(keys, vocabulary, eps) if narrow else None,
    )


def _feed_forwards(
    keys: ConfigKeys, hidden: int, attention: list[Attention], act: str, eps: float
) -> list[GatedMLP | Mixture]:
    """Of every layer: those that share keys and values may be twice as wide."""
    width, double = keys.size("intermediate_size", 9216), keys.flag("use_double_wide_mlp", False)
    dense = [GatedMLP(2 * width if double and mixer.kv_from is not None else width, act) for mixer in attention]
    if not keys.flag("enable_moe_block", False):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            keys.raw(key)
        return [*dense]
    if narrow := keys.raw("hidden_size_per_layer_input", 256):
        # Experts are a layer's last groups, one after the other.
        raise keys.refused("hidden_size_per_layer_input", "0 beside experts (enable_moe_block)", narrow)
    experts, chosen = keys.size("num_experts", None), keys.size("top_k_experts", None)
    if chosen > experts:
        raise keys.refused("top_k_experts", f"a number up to that of experts ({experts})", chosen)
    router = Router(
        Linear("router.proj", (experts, hidden)), experts, chosen, normalise=True, input_scale="router.scale",
        input_eps=eps, expert_scale="router.per_expert_scale",
    )  # fmt: skip
    experts_norm, dense_after, experts_after = (
        Norm(f"{name}_feedforward_layernorm_{n}", eps) for name, n in (("pre", 2), ("post", 1), ("post", 2))
    )
    expert = GatedMLP(keys.size("moe_intermediate_size", None), act, name="experts")
    return [Mixture(router, expert, one, None, experts_norm, dense_after, experts_after) for one in dense]


def _attention(keys: ConfigKeys, kinds: list[str], eps: float) -> list[Attention]:
    """Of every layer."""
    window, same = keys.size("sliding_window", 512), keys.flag("attention_k_eq_v", False)
    plain = Attention(
        keys.size("num_attention_heads", 8),
        keys.size("num_key_value_heads", 4),
        keys.size("head_dim", 256),
        q_norm=Norm("self_attn.q_norm", eps),
        k_norm=Norm("self_attn.k_norm", eps),
        scale=1.0,
        value_eps=eps,
    )
    full_dim, full_heads = keys.size("global_head_dim", 512), keys.size_or_none("num_global_key_value_heads", None)
    full = replace(
        plain, head_dim=full_dim, kv_heads=full_heads if same and full_heads else plain.kv_heads, value_is_key=same
    )
    found = [
        replace(full, rotary=kind) if kind == "full_attention" else replace(plain, rotary=kind, window=window)
        for kind in kinds
    ]
    found = _overridden(keys, kinds, found)
    return _sharing(keys, kinds, found)


def _overridden(keys: ConfigKeys, kinds: list[str], attention: list[Attention]) -> list[Attention]:
    """With the sizes of ``per_layer_config``, as transformers writes them, in the place of those of ``global_…``."""
    given = keys.raw("per_layer_config")
    if given is None:
        return attention
    names = {"head_dim": "head_dim", "num_key_value_heads": "kv_heads"}
    plain = keys.size("num_key_value_heads", 4), keys.size("head_dim", 256)
    found = [replace(mixer, kv_heads=plain[0], head_dim=plain[1]) for mixer in attention]
    expected = f"sizes ({', '.join(names)}) by the numbers of layers"
    if not isinstance(given, Mapping):
        raise keys.refused("per_layer_config", expected, given)
    for number, sizes in given.items():
        index = int(number) if str(number).isdecimal() else len(kinds)
        if index >= len(kinds) or not isinstance(sizes, Mapping) or not sizes.keys() <= names.keys():
            raise keys.refused("per_layer_config", expected, {number: sizes})
        inner = ConfigKeys({"model_type": keys.family, **sizes})
        own: dict[str, Any] = {names[key]: inner.size(key, None) for key in sizes}
        found[index] = replace(found[index], **own)
    for kind in set(kinds):
        unlike = {(m.head_dim, m.kv_heads) for m, own in zip(found, kinds, strict=True) if own == kind}
        if len(unlike) > 1:
            expected = f"one head_dim and num_key_value_heads for every {kind} layer"
            raise keys.refused("per_layer_config", expected, sorted(unlike))
    return found


def _sharing(keys: ConfigKeys, kinds: list[str], attention: list[Attention]) -> list[Attention]:
    """The last ``num_kv_shared_layers`` layers attend to keys and values of the last layer of their kind before."""
    shared = keys.raw("num_kv_shared_layers", 0)
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < len(kinds):
        raise keys.refused("num_kv_shared_layers", f"a number from 0 to {len(kinds) - 1}", shared)
    first = len(kinds) - shared
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    if shared and last.keys() != set(kinds):
        raise keys.refused("num_kv_shared_layers", "layers of every kind before those that share", shared)
    return [
        mixer if index < first else replace(mixer, kv_from=last[kind], k_norm=None, value_eps=None, value_is_key=False)
        for index, (mixer, kind) in enumerate(zip(attention, kinds, strict=True))
    ]


def _rotary(keys: ConfigKeys, kind: str, head_dim: int, context: int) -> Rotary:
    found = keys.raw("rope_parameters")
    found = ROTARY if found is None else found
    inside = found.get(kind) if isinstance(found, Mapping) else None
    if not isinstance(inside, Mapping):
        raise keys.refused("rope_parameters", f"an object for {kind}", found)
    return rotary_of(keys, inside, head_dim, context, None, theta=None)


def _per_layer(keys: ConfigKeys, vocabulary: int, eps: float) -> PerLayerEmbedding:
    width, tokens = keys.size("hidden_size_per_layer_input", 256), keys.size("vocab_size_per_layer_input", 262144)
    if tokens < vocabulary:
        raise keys.refused("vocab_size_per_layer_input", f"at least vocab_size ({vocabulary})", tokens)
    return PerLayerEmbedding(width, tokens, Norm("model.per_layer_projection_norm", eps))
