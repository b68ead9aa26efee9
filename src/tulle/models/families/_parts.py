"""What several families share: the groups of a gated layer, and the rotary table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from tulle.errors import UserError
from tulle.models.config_keys import ConfigKeys, positive, same
from tulle.models.description import (
    ACTIVATIONS,
    Attention,
    Decoder,
    GatedMLP,
    Layer,
    Linear,
    LinearGroup,
    Norm,
    Rotary,
    RotaryKind,
)


def gated_decoder(
    keys: ConfigKeys,
    *,
    hidden: int,
    intermediate: int,
    attention: list[Attention],
    rotary: Rotary,
    context: int,
    vocabulary: int,
    eps: float,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
) -> Decoder:
    """Llama's layout: one attention and one gated MLP per layer, a norm before each. Refuses unread keys."""
    feed_forward = GatedMLP(intermediate, keys.choice("hidden_act", "silu", ACTIVATIONS))
    norms = Norm("input_layernorm", eps), Norm("post_attention_layernorm", eps)
    layers = []
    for index, mixer in enumerate(attention):
        if mixer.heads % mixer.kv_heads:
            raise UserError(
                f"expected num_attention_heads in equal groups per KV head, found {mixer.heads} heads and "
                f"{mixer.kv_heads} KV heads; repair the config"
            )
        q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        groups = (
            LinearGroup(
                "qkv",
                (
                    Linear("self_attn.q_proj", (q, hidden), qkv_bias),
                    Linear("self_attn.k_proj", (kv, hidden), qkv_bias),
                    Linear("self_attn.v_proj", (kv, hidden), qkv_bias),
                ),
                norm=norms[0].name,
            ),
            LinearGroup(
                "o",
                (Linear("self_attn.o_proj", (hidden, q), o_bias),),
                producers=("self_attn.v_proj",),
                residual=norms[0].name,
            ),
            LinearGroup(
                "gate_up",
                (
                    Linear("mlp.gate_proj", (intermediate, hidden), mlp_bias),
                    Linear("mlp.up_proj", (intermediate, hidden), mlp_bias),
                ),
                norm=norms[1].name,
            ),
            LinearGroup(
                "down",
                (Linear("mlp.down_proj", (hidden, intermediate), mlp_bias),),
                producers=("mlp.up_proj", "mlp.gate_proj"),
                residual=norms[1].name,
            ),
        )
        layers.append(Layer(index, f"model.layers.{index}.", hidden, mixer, feed_forward, *norms, groups))
    found = Decoder(
        model_type=keys.family,
        hidden=hidden,
        vocabulary=vocabulary,
        context=context,
        layers=tuple(layers),
        final_norm=Norm("model.norm", eps),
        rotary={"default": rotary},
        tied=keys.flag("tie_word_embeddings", False),
    )
    keys.finish()
    return found


def windows(keys: ConfigKeys, layers: int) -> list[int | None]:
    """Qwen's sliding windows: off unless ``use_sliding_window``, then from layer ``max_window_layers`` on, unless
    ``layer_types`` says otherwise."""
    window = keys.size_or_none("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    keys.raw("sliding_window")  # without effect, where it is not used
    first = keys.raw("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise keys.refused("max_window_layers", "a whole number", first)
    types = keys.raw("layer_types", None)
    if types is None:
        return [window if index >= first else None for index in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise keys.refused("layer_types", f"a list of {layers} types", types)
    found: list[int | None] = []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.refused("layer_types", "full_attention or sliding_attention", kind)
        if kind == "sliding_attention" and window is None:
            raise keys.refused("layer_types", "full_attention without sliding_window and use_sliding_window", kind)
        found.append(window if kind == "sliding_attention" else None)
    return found


ROTARY_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}
"""Keys of ``rope_parameters`` that each kind reads, besides ``rope_type`` and ``rope_theta``."""


def read_rotary(keys: ConfigKeys, head_dim: int, context: int) -> Rotary:
    """The one rotary table of a family without partial rotation.

    As transformers 5: a non-empty ``rope_scaling`` (old) takes the place of ``rope_parameters`` (new); θ inside wins
    over ``rope_theta`` beside it, and is 10,000 where there is none; ``original_max_position_embeddings`` beside wins
    over that inside.
    """
    old, new = keys.raw("rope_scaling"), keys.raw("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise keys.refused(key, "an object", value)
    inside = old or new or {}
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind not in get_args(RotaryKind):
        raise keys.refused("rope_type", f"one of {', '.join(get_args(RotaryKind))}", kind)
    if "type" in inside and inside["type"] != kind:
        raise keys.refused("rope_parameters", f"type and rope_type alike ({kind})", inside["type"])
    theta = inside.get("rope_theta", keys.raw("rope_theta", 10_000.0))
    _check_rotary_keys(keys, kind, inside)
    share = inside.get("partial_rotary_factor", keys.raw("partial_rotary_factor", None))
    share = 1.0 if share is None else positive(share, "partial_rotary_factor")
    if share > 1 or share < 1 and kind != "proportional":
        raise keys.refused("partial_rotary_factor", "1 (all channels of a head are rotated)", share)
    original = keys.raw("original_max_position_embeddings", inside.get("original_max_position_embeddings", context))
    found = Rotary(
        dim=head_dim,
        theta=positive(theta, "rope_theta"),
        kind=kind,
        max_positions=context,
        rotated=share,
        **_rotary_values(keys, kind, inside, original),
    )
    _check_rotary(keys, found)
    return found


def _check_rotary_keys(keys: ConfigKeys, kind: str, inside: Mapping[str, Any]) -> None:
    for key in inside:
        if key in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *ROTARY_KEYS[kind]):
            continue
        if key == "original_max_position_embeddings" and kind in ("default", "linear"):
            continue  # without effect there: a note of what was stretched
        raise UserError(
            f"expected rope keys that tulle knows for {kind} in a {keys.family} config.json, found {key!r}; remove it "
            "if it changes nothing"
        )
    needed = {"linear", "dynamic", "yarn", "llama3"}
    if kind in needed and "factor" not in inside:
        raise keys.refused("rope_parameters", f"factor for {kind}", dict(inside))


def _rotary_values(keys: ConfigKeys, kind: str, inside: Mapping[str, Any], original: Any) -> dict[str, Any]:
    """Fields of :class:`Rotary` that a kind reads."""
    found: dict[str, Any] = {}
    wanted = ROTARY_KEYS[kind]
    may_be_null = {"attention_factor", "mscale", "mscale_all_dim"} | (
        {"factor"} if kind in ("yarn", "longrope") else set()
    )
    defaulted = {"beta_fast", "beta_slow"}
    for key in wanted:
        value = inside.get(key)
        if key == "original_max_position_embeddings":
            if isinstance(original, bool) or not isinstance(original, int) or original < 1:
                raise keys.refused(key, "a positive whole number", original)
            found["original_max_positions"] = original
        elif key == "partial_rotary_factor":
            continue
        elif key in ("short_factor", "long_factor"):
            if not isinstance(value, list | tuple):
                raise keys.refused(key, "a list of numbers", value)
            found[key] = tuple(positive(v, key) for v in value)
        elif key == "truncate":
            found[key] = inside.get(key, True)
            if not isinstance(found[key], bool):
                raise keys.refused(key, "true or false", value)
        elif value is None and (key in may_be_null or key in defaulted or key not in inside and kind == "proportional"):
            continue
        elif key in defaulted and same(value, 0):
            continue  # transformers takes the default
        else:
            found[key] = positive(value, key)
    return found


def _check_rotary(keys: ConfigKeys, rotary: Rotary) -> None:
    if rotary.dim % 2:
        raise keys.refused("head_dim", "an even number (rotary embeddings rotate pairs)", rotary.dim)
    if rotary.kind == "dynamic" and rotary.dim < 4:
        raise keys.refused("head_dim", "4 or more with dynamic rotary embeddings", rotary.dim)
    if rotary.kind == "longrope":
        for name, values in (("short_factor", rotary.short_factor), ("long_factor", rotary.long_factor)):
            if len(values) != rotary.dim // 2:
                raise keys.refused(name, f"{rotary.dim // 2} numbers", f"{len(values)} numbers")
    if rotary.kind == "llama3" and rotary.high_freq_factor <= rotary.low_freq_factor:
        raise keys.refused("high_freq_factor", "more than low_freq_factor", rotary.high_freq_factor)
