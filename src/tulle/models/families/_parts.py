"""What several families share: layers of attention and a feed-forward, windows, and rotary tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from tulle.errors import UserError
from tulle.models.config_keys import ConfigKeys, positive, same
from tulle.models.description import (
    ACTIVATIONS,
    Absent,
    Attention,
    Decoder,
    Expert,
    FeedForward,
    GatedDeltaNet,
    GatedMLP,
    InputGate,
    LatentAttention,
    Layer,
    Linear,
    LinearGroup,
    Mamba2,
    Mixer,
    Mixture,
    Norm,
    PlainMLP,
    Producer,
    Rotary,
    RotaryKind,
    Router,
    ShortConvolution,
)


@dataclass(frozen=True)
class Norms:
    """Of a layer: before attention and feed-forward, and on their outputs."""

    mixer: Norm | None = None
    feed_forward: Norm | None = None
    mixer_after: Norm | None = None
    feed_forward_after: Norm | None = None


def llama_norms(eps: float) -> Norms:
    return Norms(Norm("input_layernorm", eps), Norm("post_attention_layernorm", eps))


def norms_after(eps: float) -> Norms:
    """On outputs alone."""
    return Norms(
        mixer_after=Norm("post_attention_layernorm", eps), feed_forward_after=Norm("post_feedforward_layernorm", eps)
    )


def head_sizes(
    keys: ConfigKeys, hidden: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None
) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim; the numbers given are the family's defaults. None: as many KV heads as query
    heads, and the width over the heads."""
    found = keys.size("num_attention_heads", heads)
    return (
        found,
        keys.size("num_key_value_heads", kv_heads, null=found),
        keys.size("head_dim", head_dim, null=hidden // found),
    )


def gated(keys: ConfigKeys, intermediate: int, key: str = "hidden_act", default: str = "silu") -> GatedMLP:
    return GatedMLP(intermediate, keys.choice(key, default, ACTIVATIONS))


def gated_decoder(
    keys: ConfigKeys,
    *,
    attention: list[Attention],
    eps: float,
    rotary: Rotary,
    intermediate: int = 0,
    mixture: Mixture | None = None,
    **settings: Any,
) -> Decoder:
    """Llama's layout: one attention and one gated MLP of width ``intermediate``, or ``mixture`` of experts, per layer,
    an RMS norm before each. Refuses unread keys."""
    feed_forward = gated(keys, intermediate) if mixture is None else [mixture] * len(attention)
    return build_decoder(
        keys, attention=attention, feed_forward=feed_forward, norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps), rotary={"default": rotary}, **settings,
    )  # fmt: skip


def mixture(
    keys: ConfigKeys, name: str, hidden: int, intermediate: int, experts: int, chosen: int, **settings: Any
) -> Mixture:
    """Gated experts under a module ``name``, whose router is its ``gate``. Numbers are the family's defaults;
    ``settings``: of :func:`router`."""
    expert = replace(gated(keys, keys.size("intermediate_size", intermediate)), name=f"{name}.experts")
    chosen, experts = keys.size("num_experts_per_tok", chosen), expert_count(keys, experts)
    return Mixture(router(keys, settings.pop("gate", f"{name}.gate"), hidden, experts, chosen, **settings), expert)


def build_decoder(
    keys: ConfigKeys,
    *,
    hidden: int,
    attention: Sequence[Mixer],
    feed_forward: GatedMLP | PlainMLP | Sequence[FeedForward],
    norms: Norms,
    final_norm: Norm,
    rotary: Mapping[str, Rotary],
    context: int,
    vocabulary: int,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    expert_bias: bool | None = None,
    names: Mapping[str, str] | None = None,
    shared_names: Mapping[str, str] | None = None,
    fused: tuple[str, ...] = (),
    residual_scale: float = 1.0,
    parallel: bool = False,
    input_gate: InputGate | None = None,
    output_scale: str | None = None,
    tied: bool = False,
    **outer: Any,
) -> Decoder:
    """A decoder of layers with attention and a feed-forward; refuses unread keys.

    ``feed_forward``: of every layer, or a list. ``names`` changes the linears' own names (``o_proj``, ``up_proj`` …),
    ``shared_names`` those of shared experts. Roles in ``fused`` (``qkv``, ``gate_up``) are one tensor, ``qkv_proj`` and
    ``gate_up_proj``, but in experts. ``expert_bias`` None: as ``mlp_bias``. ``tied``: the family's default. ``outer``:
    fields of :class:`Decoder`.
    """
    layers = []
    called = names or {}
    shared = {mixer.kv_from for mixer in attention if isinstance(mixer, Attention)}
    feed_forwards = feed_forward if isinstance(feed_forward, Sequence) else [feed_forward] * len(attention)
    for index, (mixer, mlp) in enumerate(zip(attention, feed_forwards, strict=True)):
        mixing: tuple[LinearGroup, ...]
        if isinstance(mixer, Absent):
            mixing = ()
        elif isinstance(mixer, GatedDeltaNet):
            mixing = _delta(mixer, hidden, norms.mixer)
        elif isinstance(mixer, Mamba2):
            mixing = _in_and_out(mixer.name, sum(mixer.outputs), mixer.widths[0], hidden, mixer.bias, norms.mixer)
        elif isinstance(mixer, ShortConvolution):
            mixing = _in_and_out(mixer.name, 3 * mixer.channels, mixer.channels, hidden, mixer.bias, norms.mixer)
        elif isinstance(mixer, LatentAttention):
            mixing = _latent(mixer, hidden, qkv_bias, norms.mixer)
        else:
            mixing = _attention(
                mixer, hidden, qkv_bias, o_bias, norms.mixer, "qkv" in fused, called, shared=index in shared
            )
        read = norms.mixer if parallel else norms.feed_forward
        experts: tuple[Expert, ...] = ()
        if isinstance(mlp, Absent):
            groups = mixing
        elif isinstance(mlp, Mixture):
            groups = (*mixing, *_routed(mlp, hidden, mlp_bias, read, "gate_up" in fused, shared_names or {}))
            experts = _experts(mlp, hidden, mlp_bias if expert_bias is None else expert_bias, read, called)
        else:
            groups = (*mixing, *_feed_forward(mlp, hidden, mlp_bias, read, "gate_up" in fused, called))
        if input_gate is not None:
            groups = (*groups, *_input_groups(input_gate, hidden))
        layers.append(
            Layer(
                index, f"model.layers.{index}.", hidden, mixer, mlp,
                None if isinstance(mixer, Absent) else norms.mixer,
                None if isinstance(mlp, Absent) else norms.feed_forward,
                groups, norms.mixer_after, norms.feed_forward_after, residual_scale, parallel, experts, input_gate,
                output_scale,
            )
        )  # fmt: skip
    found = Decoder(
        model_type=keys.family,
        hidden=hidden,
        vocabulary=vocabulary,
        context=context,
        layers=tuple(layers),
        final_norm=final_norm,
        rotary=rotary,
        tied=keys.flag("tie_word_embeddings", tied),
        **outer,
    )
    keys.finish()
    return found


def _attention(
    mixer: Attention,
    hidden: int,
    bias: bool,
    o_bias: bool,
    norm: Norm | None,
    fused: bool,
    called: Mapping[str, str],
    shared: bool,
) -> tuple[LinearGroup, LinearGroup]:
    """``shared``: other layers attend to its keys and values."""
    if mixer.heads % mixer.kv_heads:
        raise UserError(
            f"expected num_attention_heads in equal groups per KV head, found {mixer.heads} heads and "
            f"{mixer.kv_heads} KV heads; repair the config"
        )
    return (
        _qkv(mixer, hidden, bias, norm, fused),
        LinearGroup(
            "o",
            (Linear(f"{mixer.name}.{called.get('o_proj', 'o_proj')}", (hidden, mixer.widths[0]), o_bias),),
            norm=mixer.output_norm,
            producers=() if shared or _fixed_values(mixer) else (_values(mixer, fused),),
            adds=True,
        ),
    )


def _fixed_values(mixer: Attention) -> bool:
    """Whether the channels of its values keep their order and basis, whatever reads them: a gate multiplies what comes
    of them channel by channel; or they are another layer's, keys as well, or normed."""
    return mixer.output_gate or mixer.kv_from is not None or mixer.value_is_key or mixer.value_eps is not None


def _input_groups(gate: InputGate, hidden: int) -> tuple[LinearGroup, LinearGroup]:
    return (
        LinearGroup("input_gate", (Linear("per_layer_input_gate", (gate.width, hidden)),)),
        LinearGroup("input_down", (Linear("per_layer_projection", (hidden, gate.width)),), adds=True),
    )


def _latent(mixer: LatentAttention, hidden: int, bias: bool, norm: Norm | None) -> tuple[LinearGroup, ...]:
    """Narrow vectors, what comes of them, and the output; ``bias``: of what reads and writes the stream."""
    queries, width = mixer.heads * (mixer.plain_dim + mixer.rotary_dim), mixer.heads * mixer.value_dim
    down = Linear(f"{mixer.name}.kv_a_proj_with_mqa", (mixer.kv_rank + mixer.rotary_dim, hidden), bias)
    up = Linear(f"{mixer.name}.kv_b_proj", (mixer.heads * (mixer.plain_dim + mixer.value_dim), mixer.kv_rank))
    if mixer.query_rank is None:
        first: tuple[LinearGroup, ...] = (
            LinearGroup("qkv", (Linear(f"{mixer.name}.q_proj", (queries, hidden)), down), norm=norm),
        )
    else:
        narrow = Linear(f"{mixer.name}.q_a_proj", (mixer.query_rank, hidden), bias)
        wide = Linear(f"{mixer.name}.q_b_proj", (queries, mixer.query_rank))
        first = (
            LinearGroup("qkv", (narrow, down), norm=norm),
            LinearGroup("q_up", (wide,), norm=mixer.query_norm),
        )
    return (
        *first,
        LinearGroup("kv_up", (up,), norm=mixer.kv_norm),
        LinearGroup("o", (Linear(f"{mixer.name}.o_proj", (hidden, width), bias),), adds=True),
    )


def _delta(mixer: GatedDeltaNet, hidden: int, norm: Norm | None) -> tuple[LinearGroup, LinearGroup]:
    if mixer.value_heads % mixer.key_heads:
        raise UserError(
            f"expected linear_num_value_heads in equal groups per key head, found {mixer.value_heads} and "
            f"{mixer.key_heads}; repair the config"
        )
    values = mixer.widths[2]
    rows = {"qkv": sum(mixer.widths), "z": values, "b": mixer.value_heads, "a": mixer.value_heads}
    if mixer.fused:
        rows = {"qkvz": rows["qkv"] + rows["z"], "ba": 2 * mixer.value_heads}
    linears = tuple(Linear(f"{mixer.name}.in_proj_{name}", (count, hidden)) for name, count in rows.items())
    return (
        LinearGroup("qkv", linears, norm=norm),
        LinearGroup("o", (Linear(f"{mixer.name}.out_proj", (hidden, values)),), adds=True),
    )


def _in_and_out(
    name: str, outputs: int, inputs: int, hidden: int, bias: bool, norm: Norm | None
) -> tuple[LinearGroup, LinearGroup]:
    """``in_proj``, which gives all that a mixer needs, and ``out_proj``."""
    return (
        LinearGroup("qkv", (Linear(f"{name}.in_proj", (outputs, hidden), bias),), norm=norm),
        LinearGroup("o", (Linear(f"{name}.out_proj", (hidden, inputs), bias),), adds=True),
    )


def _qkv(mixer: Attention, hidden: int, bias: bool, norm: Norm | None, fused: bool) -> LinearGroup:
    queries, keys, values = mixer.widths
    rows = {"q": 2 * queries if mixer.output_gate else queries}
    if mixer.kv_from is None:
        rows |= {"k": keys} if mixer.value_is_key else {"k": keys, "v": values}
    if fused:
        linears = [Linear(f"{mixer.name}.qkv_proj", (sum(rows.values()), hidden), bias)]
    else:
        linears = [Linear(f"{mixer.name}.{letter}_proj", (count, hidden), bias) for letter, count in rows.items()]
    return LinearGroup("qkv", tuple(linears), norm=norm)


def _values(mixer: Attention, fused: bool) -> Producer:
    """The rows that give the values."""
    q, k, v = mixer.widths
    linear = mixer.output_norm is None
    if fused:
        return Producer(f"{mixer.name}.qkv_proj", q + k, q + k + v, linear)
    return Producer(f"{mixer.name}.v_proj", 0, v, linear)


def _feed_forward(
    mlp: GatedMLP | PlainMLP, hidden: int, bias: bool, norm: Norm | None, fused: bool, called: Mapping[str, str]
) -> tuple[LinearGroup, LinearGroup]:
    def linear(name: str, rows: int, columns: int) -> Linear:
        return Linear(f"{mlp.name}.{called.get(name, name)}", (rows, columns), bias)

    up, width = linear("up_proj", mlp.intermediate, hidden), mlp.intermediate
    first: tuple[Linear, ...] = (up,)
    producers: tuple[Producer, ...] = (Producer(up.name, 0, width, linear=False),)
    if isinstance(mlp, GatedMLP):
        gate = linear("gate_proj", width, hidden)
        both = linear("gate_up_proj", 2 * width, hidden)
        first = (both,) if fused else (gate, up)
        through = mlp.inner_norm is None and mlp.limit is None and not mlp.up_offset
        up_rows = (both.name, width, 2 * width) if fused else (up.name, 0, width)
        gate_rows = (both.name if fused else gate.name, 0, width)
        producers = (Producer(*up_rows, through), Producer(*gate_rows, linear=False))
    return (
        LinearGroup("gate_up", first, norm=norm),
        LinearGroup("down", (linear("down_proj", hidden, width),), norm=mlp.inner_norm, producers=producers, adds=True),
    )


def _routed(
    mixture: Mixture, hidden: int, bias: bool, norm: Norm | None, fused: bool, called: Mapping[str, str]
) -> tuple[LinearGroup, ...]:
    """The router, and the shared expert."""
    gate = () if mixture.shared_gate is None else (mixture.shared_gate,)
    own = None if mixture.router.input_scale is not None else norm
    router = LinearGroup("router", (mixture.router.linear, *gate), norm=own)
    return (router, *(_feed_forward(mixture.shared, hidden, bias, norm, fused, called) if mixture.shared else ()))


def _experts(
    mixture: Mixture, hidden: int, bias: bool, norm: Norm | None, called: Mapping[str, str]
) -> tuple[Expert, ...]:
    norm = mixture.expert_norm or norm
    return tuple(
        Expert(
            index,
            _feed_forward(
                replace(mixture.expert, name=f"{mixture.expert.name}.{index}"), hidden, bias, norm, False, called
            ),
        )
        for index in range(mixture.router.experts)
    )


def expert_count(keys: ConfigKeys, default: int) -> int:
    """Of a layer, under any of the names that configs have for it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = {keys.size(name, default) for name in names if name in keys.config}
    if len(found) > 1:
        raise keys.refused("num_experts", f"the same as num_local_experts ({max(found)})", min(found))
    return found.pop() if found else default


def router(
    keys: ConfigKeys, name: str, hidden: int, experts: int, chosen: int, bias: bool = False, **settings: Any
) -> Router:
    """A router of the layer's input. Refuses more chosen experts than there are, and groups that do not come out."""
    found = Router(Linear(name, (experts, hidden), bias), experts, chosen, **settings)
    if chosen > experts:
        raise keys.refused("num_experts_per_tok", f"a number up to that of experts ({experts})", chosen)
    if experts % found.groups:
        raise keys.refused("n_group", f"a divisor of the number of experts ({experts})", found.groups)
    if found.chosen_groups > found.groups or found.chosen_groups * experts // found.groups < chosen:
        raise keys.refused("topk_group", "groups that hold the chosen experts", found.chosen_groups)
    if found.group_best > experts // found.groups:
        raise keys.refused("n_group", f"groups of at least {found.group_best} experts", found.groups)
    return found


def step_limits(keys: ConfigKeys, key: str = "time_step_limit") -> tuple[float, float]:
    """Of Mamba-2's steps; the greatest may be infinite, which transformers writes as an object."""
    found = keys.raw(key)
    if found is None:
        return 0.0, math.inf
    least, most = found if isinstance(found, list | tuple) and len(found) == 2 else (None, None)
    most = math.inf if most == {"__float__": "Infinity"} else most
    if not isinstance(least, int | float) or not isinstance(most, int | float) or not 0 <= least <= most:
        raise keys.refused(key, "the least and the greatest step", found)
    return float(least), float(most)


def every(layers: int, number: int, kind: str = "sliding_attention") -> list[str]:
    """``kind`` for every layer but each ``number``-th, which is ``full_attention``."""
    return ["full_attention" if (index + 1) % number == 0 else kind for index in range(layers)]


EARLIER = {"attention": "full_attention", "mamba": "linear_attention"}
"""Names of layers' types in older files, and what transformers 5 calls them."""


def layer_types(keys: ConfigKeys, layers: int, default: list[str], kind: str = "sliding_attention") -> list[str]:
    """``full_attention`` or ``kind`` for every layer."""
    found = keys.raw("layer_types", None)
    if found is None:
        return default
    if not isinstance(found, list) or len(found) != layers:
        raise keys.refused("layer_types", f"a list of {layers} types", found)
    found = [EARLIER.get(one, one) if isinstance(one, str) else one for one in found]
    for one in found:
        if one not in ("full_attention", kind):
            raise keys.refused("layer_types", f"full_attention or {kind}", one)
    return found


def windows(keys: ConfigKeys, layers: int) -> list[int | None]:
    """Qwen's sliding windows: off unless ``use_sliding_window``, then from layer ``max_window_layers`` on, unless
    ``layer_types`` says otherwise."""
    window = keys.size_or_none("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    keys.raw("sliding_window")  # without effect, where it is not used
    first = keys.raw("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise keys.refused("max_window_layers", "a whole number", first)
    slides = [window is not None and index >= first for index in range(layers)]
    default = ["sliding_attention" if one else "full_attention" for one in slides]
    kinds = layer_types(keys, layers, default)
    if window is None and "sliding_attention" in kinds:
        expected = "full_attention without sliding_window and use_sliding_window"
        raise keys.refused("layer_types", expected, "sliding_attention")
    return [window if kind == "sliding_attention" else None for kind in kinds]


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


def read_rotary(
    keys: ConfigKeys,
    head_dim: int,
    context: int,
    *,
    partial: float | None = None,
    theta: float = 10_000.0,
    interleaved: bool = False,
    also: tuple[str, ...] = (),
) -> Rotary:
    """The one rotary table of a model.

    As transformers 5: a non-empty ``rope_scaling`` (old) takes the place of ``rope_parameters`` (new); θ inside wins
    over ``rope_theta`` beside it, and is ``theta`` where there is none; ``original_max_position_embeddings`` beside
    wins over that inside. ``partial``: the family may rotate a share of the channels, and this is its default.
    ``also``: keys inside that the family reads for itself.
    """
    old, new = keys.raw("rope_scaling"), keys.raw("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise keys.refused(key, "an object", value)
    inside = {key: value for key, value in (old or new or {}).items() if key not in also}
    return rotary_of(keys, inside, head_dim, context, partial, keys.raw("rope_theta", theta), interleaved)


def rotary_of(
    keys: ConfigKeys,
    inside: Mapping[str, Any],
    head_dim: int,
    context: int,
    partial: float | None,
    theta: Any,
    interleaved: bool = False,
) -> Rotary:
    """The table of one object of ``rope_parameters``."""
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind not in get_args(RotaryKind):
        raise keys.refused("rope_type", f"one of {', '.join(get_args(RotaryKind))}", kind)
    if "type" in inside and inside["type"] != kind:
        raise keys.refused("rope_parameters", f"type and rope_type alike ({kind})", inside["type"])
    theta = inside.get("rope_theta", theta)
    _check_rotary_keys(keys, kind, inside)
    share = inside.get("partial_rotary_factor", keys.raw("partial_rotary_factor", partial))
    share = 1.0 if share is None else positive(share, "partial_rotary_factor")
    if share > 1 or share < 1 and kind != "proportional" and partial is None:
        raise keys.refused("partial_rotary_factor", "1 (all channels of a head are rotated)", share)
    original = keys.raw("original_max_position_embeddings", inside.get("original_max_position_embeddings", context))
    found = Rotary(
        dim=head_dim if kind == "proportional" else int(head_dim * share),
        theta=positive(theta, "rope_theta"),
        kind=kind,
        interleaved=interleaved,
        max_positions=context,
        rotated=share if kind == "proportional" else 1.0,
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


def rotary_by_type(
    keys: ConfigKeys, head_dim: int, context: int, thetas: Mapping[str, float], local: str | None = None
) -> dict[str, Rotary]:
    """Tables of ``full_attention`` and ``sliding_attention``, each with an object of its own in ``rope_parameters``.

    As transformers 5: the older ``rope_scaling`` beside stretches the full layers' table alone. θ of a table that has
    none is ``rope_theta`` for the full layers and the key ``local`` for the others, then that of ``thetas``.
    """
    old, new = keys.raw("rope_scaling"), keys.raw("rope_parameters")
    new = {} if new is None else new
    for key, value in (("rope_scaling", old or {}), ("rope_parameters", new)):
        if not isinstance(value, Mapping):
            raise keys.refused(key, "an object", value)
    for key in new:
        if key not in thetas:
            raise keys.refused("rope_parameters", f"objects for {' and '.join(thetas)}", dict(new))
    found = {}
    for kind, theta in thetas.items():
        inside = new.get(kind) or {}
        if not isinstance(inside, Mapping):
            raise keys.refused("rope_parameters", f"an object for {kind}", inside)
        if kind == "full_attention":
            inside = {**inside, **(old or {})}
        beside_key = "rope_theta" if kind == "full_attention" else local
        beside = theta if beside_key is None else keys.raw(beside_key, theta)
        found[kind] = rotary_of(keys, inside, head_dim, context, None, beside)
    return found
