"""What a model is made of, as data: one description, read by walker, transformers integration and engine.

``describe`` turns a ``config.json`` into a :class:`Decoder`. What is special about a family stands in one file of
``tulle.models.families``; everything else reads only the classes below. This module needs no torch.

Shapes are ``(C_out, C_in)``. Names of a layer's tensors are relative to the layer (``self_attn.q_proj``); its
``prefix`` makes them full (``model.layers.3.``).
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from tulle.errors import UserError

NormKind = Literal["rms", "layer"]
ROLES = ("qkv", "o", "gate_up", "down")
"""Roles of linear groups that a recipe's steps can target, in the order in which they run."""
TARGETS = {"q_up": "qkv", "kv_up": "qkv", "input_gate": "gate_up", "input_down": "down"}
"""Further roles, of latent attention and of a layer's own inputs, and what of ROLES a recipe names to reach them."""
STREAM_READERS = ("qkv", "router", "gate_up", "input_gate")
"""Roles that read the residual stream, through a norm where there is one."""
TABLES = ("embedding", "head")
"""Roles outside the blocks, which a step has only where it names them. A tied model has one table for both."""
RotaryKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""``hidden_act`` of a config → the function's one name here. Several spellings of transformers are one function."""


@dataclass(frozen=True)
class Norm:
    """A norm; its width is that of what it is applied to.

    rms: x/√(mean x² + ``eps``) · (``offset`` + w). layer: (x − mean)/√(var + ``eps``) · (``offset`` + w) + b.
    """

    name: str
    eps: float
    kind: NormKind = "rms"
    offset: float = 0.0
    bias: bool = False

    def names(self) -> list[str]:
        """Of its tensors."""
        return [f"{self.name}.weight", *([f"{self.name}.bias"] if self.bias else [])]

    def tensors(self, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (width,)}
        if self.bias:
            shapes[f"{self.name}.bias"] = (width,)
        return shapes


@dataclass(frozen=True)
class Rotary:
    """A table of rotary position embeddings; ``tulle.models.rotary`` computes it.

    The first ``dim`` channels of a head are rotated, channel i together with channel i + dim/2, or, ``interleaved``,
    channel 2i together with 2i + 1. Fields that a kind does not use stay at their defaults.
    """

    dim: int
    theta: float
    kind: RotaryKind = "default"
    max_positions: int = 0
    """Positions that the model is said to support (``max_position_embeddings``)."""
    factor: float | None = None
    """Of stretching; None for yarn and longrope: ``max_positions``/``original_max_positions``."""
    original_max_positions: int | None = None
    """Positions of the first training; yarn, longrope, llama3."""
    attention_factor: float | None = None
    """Of cosines and sines, for yarn and longrope; None: what the paper suggests for the factor."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: whether the corrected range ends at whole channels."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotated: float = 1.0
    """proportional: share of the channels whose frequency is not 0."""
    interleaved: bool = False


@dataclass(frozen=True)
class Linear:
    """y = x·Wᵀ (+ b), W of ``shape`` ``(C_out, C_in)``, stored under ``name`` + ``.weight`` (and ``.bias``)."""

    name: str
    shape: tuple[int, int]
    bias: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.weight": self.shape}
        if self.bias:
            shapes[f"{self.name}.bias"] = self.shape[:1]
        return shapes


@dataclass(frozen=True)
class Producer:
    """Output rows ``start`` … ``stop`` − 1 of the linear ``name``: all of it, or a part of a tensor that holds several.

    ``linear``: whether what comes in between (a gate, but no norm, activation, limit or sum) lets a factor of these
    channels through.
    """

    name: str
    start: int
    stop: int
    linear: bool = True

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class _Rows(Protocol):
    """What :func:`require_plain_values` asks for."""

    @property
    def linear(self) -> bool: ...


P = TypeVar("P", bound=_Rows)


def require_plain_values(producers: Sequence[P]) -> P:
    """The rows that give o's inputs. Raises ``UserError`` where they do not reach o as they are, so that the values
    cannot have another basis."""
    if producers and producers[0].linear:
        return producers[0]
    raise UserError(
        "expected values that reach o as they are, found a norm or a gate in between; leave the rotation of the values "
        "out"
    )


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one layer that read the same input."""

    role: str
    """One of ROLES or TARGETS; ``router`` for what is never compressed."""
    linears: tuple[Linear, ...]
    norm: Norm | None = None
    """Whose output they read, or None."""
    producers: tuple[Producer, ...] = ()
    """Whose output channels become their input channels (v → o; up, then gate → down)."""
    adds: bool = False
    """Whether their output is added to the residual stream, through a norm or weighted or not."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)

    @property
    def inputs(self) -> int:
        """C_in, which they share."""
        return self.linears[0].shape[1]


@dataclass(frozen=True)
class Expert:
    """One of a layer's experts."""

    index: int
    groups: tuple[LinearGroup, LinearGroup]
    """``gate_up`` and ``down``."""

    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group.linears]


def target_of(role: str) -> str:
    """What a recipe names, of ROLES, to reach a group of this role."""
    return TARGETS.get(role, role)


def expert_role(role: str) -> str:
    """The role of an expert's group, where the shared expert's must be told apart from it."""
    return f"{role} of experts"


@dataclass(frozen=True)
class Attention:
    """Softmax attention. Query heads come in equal groups, each of which shares one KV head."""

    heads: int
    kv_heads: int
    head_dim: int
    name: str = "self_attn"
    """Relative name of the module."""
    rotary: str | None = "default"
    """Name of a table of ``Decoder.rotary``, or None: queries and keys know no position."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    """Of queries and keys; see ``norm_width`` and ``norm_after_rotary``."""
    norm_width: Literal["head", "all"] = "head"
    """Whether they go over every head's ``head_dim`` channels or over those of all heads at once."""
    norm_after_rotary: bool = False
    """Whether they come after the rotation."""
    window: int | None = None
    """A token sees itself and the ``window`` − 1 tokens before it; None: all."""
    scale: float | None = None
    """Of q·k; None: 1/√head_dim."""
    soft_cap: float | None = None
    """c of scores c·tanh(s/c)."""
    sinks: bool = False
    """A learned score per head that takes part in the softmax and has no value."""
    output_gate: bool = False
    """Every query head is followed by as many channels whose sigmoid multiplies its output."""
    output_norm: Norm | None = None
    """Of all heads' outputs at once, before the output linear."""
    position_scale: tuple[float, int] | None = None
    """(β, n): a query at position p is multiplied by 1 + β·ln(1 + ⌊p/n⌋)."""
    kv_from: int | None = None
    """An earlier layer whose keys and values are attended to, as they are after norm and rotation; None: its own."""
    value_is_key: bool = False
    """The key linear gives the values, too: there is no other for them."""
    value_eps: float | None = None
    """A head's values v become v/√(mean v² + ε); None: they stay as they are."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears and norms, with their shapes, by relative name."""
        return {f"{self.name}.sinks": (self.heads,)} if self.sinks else {}

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of all queries, all keys, all values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def norms(self) -> list[tuple[Norm, int]]:
        """Its norms with their widths."""
        wide = self.norm_width == "all"
        widths = self.widths if wide else (self.head_dim,) * 3
        found = [(self.q_norm, widths[0]), (self.k_norm, widths[1]), (self.output_norm, self.widths[0])]
        return [(norm, width) for norm, width in found if norm is not None]

    def query_heads(self, kv_head: int) -> range:
        """The query heads that share a KV head."""
        shared = self.heads // self.kv_heads
        return range(kv_head * shared, (kv_head + 1) * shared)


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values come of a narrow vector per token, which is what a cache has to keep, beside a
    part of the key that knows the position and that all heads share (DeepSeek-V2, 2024, section 2.1).

    Queries, too, come of a narrow vector, unless ``query_rank`` is None. Of a head's channels of queries and keys the
    last ``rotary_dim`` are rotated.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    plain_dim: int
    """Channels of a head's queries and keys that know no position."""
    rotary_dim: int
    value_dim: int
    scale: float
    """Of q·k."""
    query_norm: Norm | None
    """Of the narrow vectors."""
    kv_norm: Norm
    name: str = "self_attn"
    rotary: str | None = "default"

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {}

    def norms(self) -> list[tuple[Norm, int]]:
        own = [(self.kv_norm, self.kv_rank)]
        return own if self.query_norm is None else [(self.query_norm, self.query_rank or 0), *own]


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention by the gated delta rule (:mod:`tulle.core.delta_rule`).

    A causal convolution of ``kernel`` tokens runs over queries, keys and values; heads of queries and keys are of unit
    length; β = σ(b), g = −e^A·softplus(a + δ). Outputs are normed head by head and gated by silu(z).
    """

    key_heads: int
    value_heads: int
    """A multiple of ``key_heads``, equal groups of which share one."""
    key_dim: int
    value_dim: int
    """Channels of a head."""
    kernel: int
    eps: float
    activation: str = "silu"
    """Behind the convolution."""
    fused: bool = False
    """Whether two linears, ``in_proj_qkvz`` and ``in_proj_ba``, give all inputs, one key head's after the other's:
    queries, keys, values and z; b and a."""
    name: str = "linear_attn"
    rotary: None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of all queries, all keys, all values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        shapes: dict[str, tuple[int, ...]] = {
            "conv1d.weight": (sum(self.widths), 1, self.kernel),
            "dt_bias": (self.value_heads,),
            "A_log": (self.value_heads,),
            "norm.weight": (self.value_dim,),
        }
        return {f"{self.name}.{name}": shape for name, shape in shapes.items()}

    def norms(self) -> list[tuple[Norm, int]]:
        return []


def _convolution(name: str, channels: int, kernel: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of a convolution along the tokens that keeps channels apart."""
    return {f"{name}.weight": (channels, 1, kernel), **({f"{name}.bias": (channels,)} if bias else {})}


@dataclass(frozen=True)
class ShortConvolution:
    """Gated short convolution (Liquid AI 2025, "LFM2 Technical Report"): of the parts B, C and x that one linear gives,
    C ⊙ conv(B ⊙ x), the convolution being causal, of ``kernel`` tokens and channel by channel."""

    channels: int
    kernel: int
    bias: bool = False
    """Of the convolution and of the linears."""
    name: str = "conv"
    rotary: None = None

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        return _convolution(f"{self.name}.conv", self.channels, self.kernel, self.bias)

    def norms(self) -> list[tuple[Norm, int]]:
        return []


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2's mixer (Dao & Gu 2024, section 7; :mod:`tulle.core.state_space`).

    One linear gives a gate z, x, B and C, and a step Δ per head. A causal convolution of ``kernel`` tokens runs over x,
    B and C; Δ = softplus(Δ + δ) within ``step_limits``. A head's state forgets by e^{−e^A·Δ} and takes in B·(Δ·x)ᵀ; to
    what C reads of it D·x is added. Outputs, gated by silu(z), are normed in ``groups`` equal parts.
    """

    heads: int
    head_dim: int
    """Channels of x per head."""
    groups: int
    """Of heads, each of which shares B and C."""
    state: int
    """Channels of B and of C per group."""
    kernel: int
    eps: float
    activation: str = "silu"
    """Behind the convolution."""
    bias: bool = False
    """Of the linears."""
    convolution_bias: bool = True
    step_limits: tuple[float, float] = (0.0, math.inf)
    name: str = "mamba"
    rotary: None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x, of all B, of all C."""
        shared = self.groups * self.state
        return self.heads * self.head_dim, shared, shared

    @property
    def outputs(self) -> tuple[int, int, int]:
        """Of the first linear: z; x, B and C; Δ."""
        return self.widths[0], sum(self.widths), self.heads

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        per_head = {f"{self.name}.{name}": (self.heads,) for name in ("dt_bias", "A_log", "D")}
        convolution = _convolution(f"{self.name}.conv1d", self.outputs[1], self.kernel, self.convolution_bias)
        return {**convolution, **per_head, f"{self.name}.norm.weight": self.widths[:1]}

    def norms(self) -> list[tuple[Norm, int]]:
        return []


@dataclass(frozen=True)
class GatedMLP:
    """down(f(gate(x)) ⊙ up(x)), f of :data:`ACTIVATIONS`' values. A single linear of twice the width gives gate and
    up one after the other."""

    intermediate: int
    activation: str
    name: str = "mlp"
    inner_norm: Norm | None = None
    """Before down."""
    up_offset: float = 0.0
    """Added to up(x)."""
    limit: float | None = None
    """gate(x) is at most this, and up(x) at most this far from 0."""


@dataclass(frozen=True)
class PlainMLP:
    """down(f(up(x))), f of :data:`ACTIVATIONS`' values. xielu has two numbers of its own (``parameters``)."""

    intermediate: int
    activation: str
    name: str = "mlp"
    inner_norm: None = None

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        if self.activation != "xielu":
            return {}
        return {f"{self.name}.act_fn.{name}": shape for name, shape in XIELU.items()}


@dataclass(frozen=True)
class Router:
    """Gives every token ``chosen`` of ``experts`` experts, by the outputs of ``linear``
    (:func:`tulle.models.routing.choose`)."""

    linear: Linear
    experts: int
    chosen: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Of the outputs."""
    normalise: bool = False
    """Whether a token's weights are made to sum to 1."""
    scale: float = 1.0
    """Of the weights."""
    correction: str | None = None
    """Relative name of a tensor ``[experts]`` that is added to the scores for choosing."""
    input_scale: str | None = None
    """Relative name of a tensor ``[d]``, s: the linear reads x/√(mean x² + ``input_eps``)·s/√d of the stream x."""
    input_eps: float = 0.0
    expert_scale: str | None = None
    """Relative name of a tensor ``[experts]`` that the chosen experts' weights are multiplied by."""
    groups: int = 1
    """Equal groups of experts, of which ``chosen_groups`` are eligible, by the sum of their ``group_best`` best."""
    chosen_groups: int = 1
    group_best: int = 1


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: Σ w_e·expert_e(x) over a token's chosen experts e, plus what the ``shared`` expert gives
    for every token, by σ of the output of ``shared_gate`` where there is one."""

    router: Router
    expert: GatedMLP | PlainMLP
    """What all are alike in; its ``name`` is that of their list."""
    shared: GatedMLP | PlainMLP | None = None
    shared_gate: Linear | None = None
    expert_norm: Norm | None = None
    """Of the stream, for the routed experts; None: they read what the shared one reads."""
    shared_norm_after: Norm | None = None
    experts_norm_after: Norm | None = None
    """On what the shared expert gives, and on the sum of the others."""
    inner_norm: None = None

    def stream_norms(self) -> list[Norm]:
        """Norms over the channels of the residual stream."""
        return [n for n in (self.expert_norm, self.shared_norm_after, self.experts_norm_after) if n is not None]

    @property
    def intermediate(self) -> int:
        """Of an expert."""
        return self.expert.intermediate

    @property
    def activation(self) -> str:
        return self.expert.activation

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        router = self.router
        shapes: dict[str, tuple[int, ...]] = {}
        if router.input_scale is not None:
            shapes[router.input_scale] = router.linear.shape[1:]
        for name in (router.correction, router.expert_scale):
            if name is not None:
                shapes[name] = (router.experts,)
        return shapes


XIELU: dict[str, tuple[int, ...]] = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
"""xIELU's numbers (Huang & Schlag 2024, equation 6), with their shapes in a checkpoint."""


@dataclass(frozen=True)
class Absent:
    """The part that a layer does not have where it is a mixer or a feed-forward alone (Nemotron-H)."""

    name: str = ""
    rotary: None = None
    inner_norm: None = None
    intermediate: int = 0
    activation: str = "silu"

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {}

    def norms(self) -> list[tuple[Norm, int]]:
        return []


@dataclass(frozen=True)
class PerLayerEmbedding:
    """Gives every layer an input of its own of every token (from Gemma 3n, 2025, on): of the token's embedding h,
    scaled, p = (norm(P·h/√d) + √e·t)/√2, where P has ``width`` rows per layer and t is the layer's part of the token's
    row of a table ``[vocabulary, layers·width]``."""

    width: int
    """e: channels of one layer's input."""
    vocabulary: int
    norm: Norm
    """Over ``width`` channels; its name, like the others, is full."""
    table: str = "model.embed_tokens_per_layer.weight"
    projection: str = "model.per_layer_model_projection.weight"
    """P."""

    def tensors(self, layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
        every = layers * self.width
        return {self.table: (self.vocabulary, every), self.projection: (every, hidden), **self.norm.tensors(self.width)}


@dataclass(frozen=True)
class InputGate:
    """What a layer does with its own input p of ``width`` channels: x + norm(down(f(gate(x)) ⊙ p)) behind the
    feed-forward; gate and down are groups of the roles ``input_gate`` and ``input_down``."""

    width: int
    activation: str
    norm: Norm


Mixer = Attention | LatentAttention | GatedDeltaNet | ShortConvolution | Mamba2 | Absent
"""What mixes tokens in a layer."""
FeedForward = GatedMLP | PlainMLP | Mixture | Absent
"""What a layer does to every token by itself."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer: x + r·after(mixer(norm(x))), then x + r·after(feed_forward(norm(x))); norms that are None are
    left out. ``parallel``: both read the layer's input, and both are added to it."""

    index: int
    prefix: str
    """Of its tensors' full names, with the dot."""
    hidden: int
    mixer: Mixer
    feed_forward: FeedForward
    mixer_norm: Norm | None
    feed_forward_norm: Norm | None
    """None in a parallel layer: the feed-forward reads what the mixer reads."""
    groups: tuple[LinearGroup, ...]
    """In the order in which they run; those of ``experts`` come after them. Of a mixture of experts, ``gate_up`` and
    ``down`` are the shared expert's."""
    mixer_norm_after: Norm | None = None
    feed_forward_norm_after: Norm | None = None
    residual_scale: float = 1.0
    """r."""
    parallel: bool = False
    experts: tuple[Expert, ...] = ()
    input_gate: InputGate | None = None
    output_scale: str | None = None
    """Relative name of a tensor ``[1]`` that the layer's output is multiplied by."""

    @property
    def attention(self) -> Attention:
        """The mixer. Raises ``UserError`` for one of another kind."""
        if isinstance(self.mixer, Attention):
            return self.mixer
        raise UserError(f"expected attention in layer {self.index}, found {type(self.mixer).__name__}")

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads and head_dim; channels that no head keeps together count as those of one."""
        if isinstance(self.mixer, Attention):
            return self.mixer.heads, self.mixer.kv_heads, self.mixer.head_dim
        return 1, 1, 1 if isinstance(self.mixer, Absent) else self.group("o").inputs

    def group(self, role: str) -> LinearGroup:
        return next(group for group in self.groups if group.role == role)

    def all_groups(self) -> list[LinearGroup]:
        """Those of experts, too."""
        return [*self.groups, *(group for expert in self.experts for group in expert.groups)]

    def linears(self) -> list[Linear]:
        """All linears, group by group."""
        return [linear for group in self.all_groups() for linear in group.linears]

    def norms(self) -> list[tuple[Norm, int]]:
        """All norms with their widths."""
        found = [(norm, self.hidden) for norm in self.stream_norms()] + self.mixer.norms()
        inner = self.feed_forward.inner_norm
        return found if inner is None else [*found, (inner, self.feed_forward.intermediate)]

    def stream_norms(self) -> list[Norm]:
        """Norms over the channels of the residual stream."""
        around = (self.mixer_norm, self.mixer_norm_after, self.feed_forward_norm, self.feed_forward_norm_after)
        inside = self.feed_forward.stream_norms() if isinstance(self.feed_forward, Mixture) else []
        last = None if self.input_gate is None else self.input_gate.norm
        return [norm for norm in (*around, *inside, last) if norm is not None]

    def own_norms(self) -> list[tuple[LinearGroup, Norm]]:
        """Groups that read a norm's output, and the norm, where no other group reads it."""
        read = [group.norm.name for group in self.all_groups() if group.norm is not None]
        return [(g, g.norm) for g in self.groups if g.norm is not None and read.count(g.norm.name) == 1]

    def others(self) -> dict[str, tuple[int, ...]]:
        """Tensors that belong to no linear and no norm, with their shapes, by relative name."""
        scale: dict[str, tuple[int, ...]] = {} if self.output_scale is None else {self.output_scale: (1,)}
        own = self.mixer.parameters | scale
        return own if isinstance(self.feed_forward, GatedMLP) else own | self.feed_forward.parameters

    def tensors(self, expert: int | None = None) -> dict[str, tuple[int, ...]]:
        """Every tensor of the layer with its shape, by relative name; or of one of its experts."""
        experts = self.experts if expert is None else (self.experts[expert],)
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in (linear for one in experts for linear in one.linears()):
            shapes |= linear.tensors()
        return shapes if expert is not None else self.tensors_without_experts() | shapes

    def tensors_without_experts(self) -> dict[str, tuple[int, ...]]:
        """Every tensor but theirs."""
        shapes: dict[str, tuple[int, ...]] = {}
        for norm, width in self.norms():
            shapes |= norm.tensors(width)
        for linear in (linear for group in self.groups for linear in group.linears):
            shapes |= linear.tensors()
        return shapes | self.others()


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model: embedding, layers, final norm, head."""

    model_type: str
    hidden: int
    vocabulary: int
    context: int
    """Positions that the model is said to support."""
    layers: tuple[Layer, ...]
    final_norm: Norm
    """Its name is full."""
    rotary: Mapping[str, Rotary]
    tied: bool
    """The head is the embedding's table."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    head_bias: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    """c of logits c·tanh(l/c)."""
    per_layer: PerLayerEmbedding | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, in the order in which their groups run."""
        found = {group.role for layer in self.layers for group in layer.all_groups()}
        return tuple(role for role in ROLES if role in found)

    def embedding_name(self, stored: Container[str]) -> str:
        """The name under which the embedding is stored: a tied model may hold only one of the two tables."""
        return self.head if self.embedding not in stored and self.tied and self.head in stored else self.embedding

    def linear_names(self, index: int) -> list[str]:
        """Full names of a layer's linears, group by group."""
        layer = self.layers[index]
        return [layer.prefix + linear.name for linear in layer.linears()]

    def role_of(self, name: str) -> str | None:
        """Role of a linear given by full or relative name; None for anything else."""
        for layer in self.layers:
            if name.startswith(layer.prefix):
                name = name.removeprefix(layer.prefix)
                break
        for layer in self.layers:
            for group in layer.all_groups():
                if name in group.names:
                    return group.role
        return None

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Embedding, final norm and, unless tied, head, with their shapes."""
        table = (self.vocabulary, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {self.embedding: table, **self.final_norm.tensors(self.hidden)}
        if not self.tied:
            shapes[self.head] = table
        if self.head_bias:
            shapes[self.head.removesuffix("weight") + "bias"] = table[:1]
        return shapes | self.per_layer_tensors()

    def per_layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """What gives every layer its own inputs, where something does."""
        return {} if self.per_layer is None else self.per_layer.tensors(len(self.layers), self.hidden)

    def shared_widths(self, index: int) -> dict[int, int]:
        """Layers in front of layer ``index`` whose keys and values it or a later one reads, and the channels of a
        token's keys and values together."""
        readers = (layer.mixer for layer in self.layers[index:] if isinstance(layer.mixer, Attention))
        read = {mixer.kv_from for mixer in readers if mixer.kv_from is not None and mixer.kv_from < index}
        return {source: sum(self.layers[source].attention.widths[1:]) for source in sorted(read)}

    def state_width(self, index: int) -> int:
        """Channels of the state in front of layer ``index`` (:mod:`tulle.models.state`); of the last one's output with
        the number of layers."""
        return self.hidden + sum(self.shared_widths(index).values())


def families() -> list[str]:
    """Model types that have a file in ``tulle.models.families``."""
    package = importlib.import_module("tulle.models.families")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def describe(config: Mapping[str, Any]) -> Decoder:
    """The description of a model from its ``config.json``.

    Missing keys have the defaults that transformers gives the family. Raises ``UserError`` for a model type without a
    family file, for values that transformers refuses or that no reader implements, and for every key that is neither
    read nor known to be harmless (``tulle.models.config_keys``).
    """
    model_type, known = config.get("model_type"), families()
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; add a file to tulle/models/families"
        raise UserError(f"expected model_type {', '.join(known)}, found {model_type!r}{hint}")
    family = importlib.import_module(f"tulle.models.families.{model_type}")
    found: Decoder = family.describe(config)
    return found
