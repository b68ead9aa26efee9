"""What the native engines are made of: the structs of native/include/tulle/{linear,engine,scaling}.hpp, field by field.

The native module reads these dataclasses by name, checks every type, dtype and length, and keeps the arrays alive. It
raises ``ValueError``, one line, for what does not fit. Arrays are one-dimensional and C-contiguous; bfloat16 is uint16.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from tulle.engine.kv_cache import PAGE

Floats = NDArray[np.float32]
LINE = 16
"""Floats of a cache line."""


def page_count(context: int) -> int:
    """Pages of a sequence of so many tokens."""
    return -(-context // PAGE)


def consecutive_pages(slots: int, context: int) -> NDArray[np.int32]:
    """Page tables ``[slots, pages]`` of sequences that share nothing: slot s has its own pages, one after the other."""
    pages = page_count(context)
    return np.arange(slots * pages, dtype=np.int32).reshape(slots, pages)


class WeightKind(StrEnum):
    """How a weight is stored. Sparse codes have 4 or 8 bits, input-major ones 2, 4 or 8."""

    CODES2 = "codes2"
    CODES3 = "codes3"
    CODES4 = "codes4"
    CODES5 = "codes5"
    CODES6 = "codes6"
    CODES8 = "codes8"
    BF16 = "bf16"
    F32 = "f32"

    @property
    def is_codes(self) -> bool:
        return self not in (WeightKind.BF16, WeightKind.F32)


class ScaleKind(StrEnum):
    """In what the scales and minima of codes are stored; u8 beside a float per row, in tiles and without minima."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    U8 = "u8"

    @staticmethod
    def of(scale: NDArray[Any]) -> ScaleKind:
        """Of an array: bits of bfloat16 are uint16."""
        kinds = {
            "uint16": ScaleKind.BF16, "float16": ScaleKind.F16, "float32": ScaleKind.F32, "uint8": ScaleKind.U8,
        }  # fmt: skip
        return kinds[scale.dtype.name]


class Layout(StrEnum):
    """In which order a linear's weights are stored; linear.hpp has pictures. Input-major ones hold codes."""

    TILES = "tiles"
    SPARSE_TILES = "sparse_tiles"
    INPUT_MAJOR = "input_major"
    SPARSE_INPUT_MAJOR = "sparse_input_major"
    INPUT_MAJOR_BLOCKS4 = "input_major_blocks4"
    SPARSE_INPUT_MAJOR_BLOCKS4 = "sparse_input_major_blocks4"

    @staticmethod
    def of(sparse: bool, block_inputs: int) -> Layout:
        """``block_inputs``: 0 for tiles, 1 or 4 for input-major."""
        tiles, single, blocks4 = (
            (Layout.SPARSE_TILES, Layout.SPARSE_INPUT_MAJOR, Layout.SPARSE_INPUT_MAJOR_BLOCKS4)
            if sparse
            else (Layout.TILES, Layout.INPUT_MAJOR, Layout.INPUT_MAJOR_BLOCKS4)
        )
        return {0: tiles, 1: single, 4: blocks4}[block_inputs]


@dataclass(frozen=True)
class LinearFacts:
    """A packed linear without its arrays: what the engine's file says of it and LinearView holds."""

    kind: WeightKind
    layout: Layout
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    segment: int
    """Inputs that share a scale, padded; of a scale in several segments, a part of them."""
    segments: int
    """Per row."""
    segments_per_scale: int
    zero: int
    """The zero point where there are no ``zeros``."""
    scale_kind: ScaleKind = ScaleKind.BF16

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: object) -> LinearFacts | None:
        """None where a field is missing, too many, or of another type."""
        hints = _fact_types()
        if not isinstance(found, dict) or set(found) != set(hints):
            return None
        if any(type(found[name]) is not (int if hint is int else str) for name, hint in hints.items()):
            return None
        try:
            return LinearFacts(**{name: hints[name](value) for name, value in found.items()})
        except ValueError:  # no such kind or layout
            return None


@cache
def _fact_types() -> dict[str, Any]:
    """Of LinearFacts, by name: a model with experts has very many of them."""
    return get_type_hints(LinearFacts)


@dataclass(frozen=True)
class Grid:
    """The quantiser of one vector: 0 bits none; 16 bits two planes of 8.

    docs/reference/format.md, "Quantised inputs".
    """

    bits: int = 0
    symmetric: bool = True
    clip: float = 1.0


@dataclass
class Selection:
    """Which of its inputs a linear sees (docs/reference/format.md, "Sparse inputs")."""

    kind: str
    """top_k, threshold or relu."""
    keep: int
    """Of every ``block`` inputs, ``unit`` at a time (top_k)."""
    block: int
    unit: int
    norm: bool
    """A unit counts by its 2-norm, not by its largest."""
    threshold: float
    rescale: bool
    score: Floats | None
    """``[columns]``: |x| counts times this."""


@dataclass
class Transform:
    """x ↦ x·T in front of linears that share an input (docs/reference/format.md, "Transforms")."""

    kind: str
    """diagonal, permutation, hadamard, block_matrix or kronecker."""
    channels: int
    block: int = 0
    base: int = 1
    """hadamard: order of the factor that is no power of two."""
    shared: bool = False
    """block_matrix: one matrix for all blocks."""
    left: int = 0
    right: int = 0
    """kronecker: sizes of the factors."""
    numbers: Floats | None = None
    """The scales; the matrix; left transposed, then right; the base's ±1."""
    index: NDArray[np.int32] | None = None
    """permutation."""


@dataclass
class Linear:
    """A packed linear with its arrays (shapes: LinearView in linear.hpp)."""

    facts: LinearFacts
    values: NDArray[np.uint8]
    masks: NDArray[np.uint8] | None
    offsets: NDArray[np.uint64] | None
    starts: NDArray[np.uint32] | None
    scales: NDArray[Any] | None
    """uint16 (bits of bfloat16 or half precision), float32 or uint8, as ``facts.scale_kind`` says."""
    zeros: NDArray[np.uint8] | None
    minima: NDArray[Any] | None
    """Like ``scales``: what every weight of a scale has added. Of dense codes in tiles."""
    bias: Floats | None
    input: Grid
    engine_grid: bool
    """The grid is not the model's but the engine's, which comes after the selection of inputs."""
    selection: Selection | None
    row_scales: Floats | None = None
    """Of scales in uint8: ``[tiles · 16]``, what the sums of rows are multiplied with."""


@dataclass
class Group:
    """Linears that share an input, and the transforms in front of them."""

    transforms: list[Transform]
    linears: list[Linear]


@dataclass
class Norm:
    """x/√(mean x² + eps)·gain + bias, the mean of x taken off before where it is ``centred``."""

    gain: Floats
    bias: Floats | None
    eps: float
    centred: bool


@dataclass
class CausalConvolution:
    """Along the tokens, channel by channel; of the sums silu, where it is set."""

    channels: int
    kernel: int
    """Tokens that an output sees, its own included."""
    taps: Floats
    """``[kernel · channels]``, the oldest token's first."""
    bias: Floats | None
    silu: bool

    @property
    def history(self) -> int:
        """Floats of a sequence."""
        return (self.kernel - 1) * self.channels


def _whole_lines(floats: int) -> int:
    return -(-floats // LINE) * LINE


@dataclass
class ShortConvolution:
    """LFM2's mixer between its linears."""

    kind: ClassVar[str] = "short_convolution"
    convolution: CausalConvolution

    @property
    def state_floats(self) -> int:
        """Of a sequence, in whole cache lines."""
        return _whole_lines(self.convolution.history)


@dataclass
class Mamba2:
    """Mamba-2 between its linears, the first of which gives [z | x, B, C | Δ]."""

    kind: ClassVar[str] = "mamba2"
    heads: int
    head_dim: int
    groups: int
    state: int
    """Channels of B and of C in a group of heads."""
    convolution: CausalConvolution
    decay: Floats
    """``[heads]``: −e^A."""
    step_bias: Floats
    """``[heads]``: δ."""
    skip: Floats
    """``[heads]``: D."""
    least: float
    most: float
    """Of a step."""
    norm: Norm
    """Of the gated outputs, in equal parts."""

    @property
    def state_floats(self) -> int:
        """Of a sequence, in whole cache lines; Mamba2 in engine.hpp says in what order."""
        return _whole_lines(self.heads * self.state * _whole_lines(self.head_dim) + self.convolution.history)


@dataclass
class NoMixer:
    """Of a layer that is a feed-forward alone."""

    kind: ClassVar[str] = "none"
    state_floats: ClassVar[int] = 0


@dataclass
class DeltaNet:
    """The mixer of a layer of linear attention by the gated delta rule, between the linears of ``qkv`` (queries, keys
    and values; z; b; a) and ``o``."""

    kind: ClassVar[str] = "delta_net"
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution: CausalConvolution
    """Of queries, keys and values."""
    decay: Floats
    """``[value_heads]``: −e^A."""
    step_bias: Floats
    """``[value_heads]``: δ."""
    norm: Norm
    """Of a head's outputs."""

    @property
    def state_floats(self) -> int:
        """Of a sequence, in whole cache lines; DeltaNet in engine.hpp says in what order."""
        matrices = self.value_heads * self.key_dim * _whole_lines(self.value_dim)
        return _whole_lines(matrices + self.convolution.history)


@dataclass
class Absorbed:
    """What latent attention has in the place of the linear that gives keys and values (engine.hpp, LatentAttention)."""

    transforms: list[Transform]
    input: Grid
    selection: Selection | None
    """Of what that linear would read, which is what is kept."""
    keys: Linear
    values: Linear
    parts: int
    """Into which a latent is cut, each of which has a scale in a row of the keys' weights."""
    factors: Floats | None
    """``[heads · parts · plain]``: those scales, with which queries are multiplied."""


@dataclass
class LatentAttention:
    """Latent attention between the linears of ``qkv`` and ``o`` (:class:`tulle.models.description.LatentAttention`)."""

    query_rank: int
    """0: the first linears give the queries."""
    rank: int
    plain: int
    rotary: int
    value: int
    query_norm: Norm | None
    norm: Norm
    query_up: Group | None
    kv_up: Group | None
    """None where it is ``absorbed``."""
    absorbed: Absorbed | None


@dataclass
class FeedForward:
    """down(act(gate)·up), or down(act(up)): of a layer, or an expert."""

    intermediate: int
    gate_up: Group
    down: Group


@dataclass
class Router:
    """Which experts a token goes to, and with what weights (:class:`tulle.models.description.Router`)."""

    group: Group
    """To scores of experts, and, where the shared one has a gate, by a second linear to that."""
    chosen: int
    score: str
    """softmax or sigmoid."""
    normalise: bool
    scale: float
    correction: Floats | None
    """``[experts]``."""
    groups: int
    chosen_groups: int
    group_best: int
    expert_scales: Floats | None = None
    """``[experts]``, of their weights, the last."""
    norm: Norm | None = None
    """Of the stream, where it does not read what the shared expert does."""


@dataclass
class Mixture:
    """A feed-forward of experts (:class:`tulle.models.description.Mixture`)."""

    router: Router
    experts: list[FeedForward]
    shared: FeedForward | None
    shared_gate: bool
    expert_norm: Norm | None = None
    """Of the stream, where routed experts do not read what the shared one does."""
    shared_after: Norm | None = None
    experts_after: Norm | None = None
    """Of what the shared expert gives, and of the sum of the others."""


@dataclass
class InputGate:
    """What a layer does with its own input p: x + norm(down(act(gate(x))·p)), behind the feed-forward."""

    gate: Group
    down: Group
    norm: Norm


@dataclass
class Layer:
    """A decoder block: a mixer, and a feed-forward or a mixture of experts; one of both may be missing.

    Norms are None where there is none: before attention and feed-forward and on their outputs ``[hidden]``, of queries
    and keys ``[head_dim]`` (or of all heads at once), of what o and down read.
    """

    qkv: Group | None
    o: Group | None
    feed_forward: FeedForward | None
    input_norm: Norm | None
    post_norm: Norm | None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_after: Norm | None = None
    feed_forward_after: Norm | None = None
    output_norm: Norm | None = None
    inner_norm: Norm | None = None
    window: int = 0
    """Tokens that attention reaches back, itself included; 0: all."""
    rotary: int = 0
    """Number of a table of the model; -1: queries and keys know no position."""
    activation: list[float] = field(default_factory=list)
    """xielu's numbers: α_p, α_n, β, ε."""
    recurrent: DeltaNet | ShortConvolution | Mamba2 | NoMixer | None = None
    """None: attention."""
    latent: LatentAttention | None = None
    """Where attention is latent."""
    mixture: Mixture | None = None
    sinks: Floats | None = None
    """``[heads]``: scores that take part in attention's softmax and have no value."""
    kv_heads: int = 0
    head_dim: int = 0
    """Of attention that is not latent."""
    kv_from: int = -1
    """An earlier layer whose keys and values are attended to; -1: its own."""
    value_is_key: bool = False
    """Keys, before their norm and position, are the values: there are no linears for these."""
    value_norm: Norm | None = None
    """``[head_dim]``"""
    input_gate: InputGate | None = None
    output_scale: float = 1.0
    """Of the stream behind the layer."""


@dataclass
class RotaryTable:
    """Frequencies of rotary position embeddings of a head's first ``2·len`` channels."""

    frequencies: list[float]
    scale: float
    """On cosines and sines."""
    interleaved: bool
    """Channels 2i and 2i + 1 are rotated together, not i and i + len."""


@dataclass
class Table:
    """``[vocabulary · hidden]`` numbers, bf16 or f32. One in codes is a :class:`Linear` instead, of dense tiles."""

    kind: WeightKind
    values: NDArray[Any]


@dataclass
class LayerInputs:
    """Inputs of every layer's own (:class:`tulle.models.description.PerLayerEmbedding`)."""

    width: int
    table: Table | Linear
    """``[vocabulary · layers · width]``; of codes a linear of ``vocabulary · layers`` rows, or more."""
    projection: Group
    norm: Norm


@dataclass
class Model:
    """A decoder, as ``_native.Engine`` takes it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gate: str
    """silu, relu, relu2, gelu_tanh, xielu or quick_gelu."""
    rotary: list[RotaryTable]
    query: Grid
    key: Grid
    value: Grid
    head_rotations: list[Transform]
    """Of every query and key head of their sizes, after RoPE."""
    embedding: Table | Linear
    """Of codes a linear: the head's own where the model ties them, so that the codes are in memory once."""
    layers: list[Layer]
    norm: Norm
    head: Group
    exact_head: Table | Linear | None
    """The head as it was stored, where ``head`` is a rougher copy."""
    gated: bool = True
    """A feed-forward of down(act(gate)·up), not of down(act(up))."""
    gate_limit: float = 0.0
    """The gate is at most this, and up at most this far from 0; 0: none."""
    up_offset: float = 0.0
    """Added to up."""
    parallel: bool = False
    """Attention and feed-forward read the same stream."""
    residual_scale: float = 1.0
    """Of what is added to the stream."""
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    """c of logits c·tanh(l/c); 0: none."""
    attention_scale: float = 0.0
    """Of q·k; 0: 1/√head_dim."""
    attention_cap: float = 0.0
    """c of scores; 0: none."""
    output_gate: bool = False
    """Behind every query head come as many channels whose sigmoid multiplies its output."""
    norm_all_heads: bool = False
    norm_after_rotary: bool = False
    """Of queries and keys."""
    value_dim: int = 0
    """Of the values that latent attention keeps, as ``kv_heads`` and ``head_dim``."""
    position_beta: float = 0.0
    position_length: int = 0
    """A query at position p is multiplied by 1 + beta·ln(1 + ⌊p/length⌋); 0: by 1."""
    layer_inputs: LayerInputs | None = None

    @property
    def state_bytes(self) -> int:
        """Of a sequence's recurrent states; 0: it has none."""
        return 4 * sum(layer.recurrent.state_floats for layer in self.layers if layer.recurrent is not None)


@dataclass
class Matrix:
    """A matrix row by row: f32, bf16, or codes8 with a scale per row (weight = scale · (code − 128))."""

    kind: WeightKind
    rows: int
    columns: int
    values: NDArray[Any] | None
    scales: Floats | None


@dataclass
class Panels:
    """A matrix ``[inputs, outputs]``, 16 outputs side by side: ``[panels][inputs][16]``, bf16 or f32."""

    kind: WeightKind
    inputs: int
    outputs: int
    values: NDArray[Any] | None


@dataclass
class Projection:
    """y = W·x + bias."""

    weight: Matrix
    bias: Floats | None = None


@dataclass
class Multiplicative:
    """y[s, m] = Σ_i x_i·D[s, i]·E[m, i] (+ bias)."""

    d: Matrix
    e: Panels
    bias: Floats | None = None


@dataclass
class Convolution:
    """Over (length × modules), causal: inputs ``[3 tokens][1 or 3 modules][M]``, outputs M."""

    weight: Panels
    bias: Floats | None = None


@dataclass
class ScalingLayer:
    """Attention is dense (q, k, v, o) or sparse (multiplicative, convolutions); so is the feed-forward (sparse: the
    controller c1, c2, and w2 row by unit)."""

    input_norm: Floats
    post_norm: Floats
    w1: Projection
    w2: Projection
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    o: Projection | None = None
    multiplicative: Multiplicative | None = None
    q_conv: Convolution | None = None
    k_conv: Convolution | None = None
    v_conv: Convolution | None = None
    c1: Matrix | None = None
    c2: Panels | None = None
    c2_bias: Floats | None = None


@dataclass
class ScalingModel:
    """A Scaling Transformer, as ``_native.ScalingEngine`` takes it."""

    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    modules: int
    """Of sparse attention; 0: dense."""
    block: int
    """Units of the sparse feed-forward that share one chosen; 0: dense."""
    loss_modules: int
    """Of a sparse head; 0: dense."""
    eps: float
    inverse_frequencies: list[float]
    """``[head_dim / 2]``, or none: no position embedding."""
    embedding: Matrix
    layers: list[ScalingLayer]
    norm: Floats
    head: Matrix | Multiplicative
    exact_head: Matrix | None


def nbytes(part: Any) -> int:
    """Of all arrays in a dataclass."""
    if isinstance(part, np.ndarray):
        return part.nbytes
    if isinstance(part, list):
        return sum(map(nbytes, part))
    return sum(nbytes(getattr(part, field.name)) for field in fields(part)) if is_dataclass(part) else 0


def copied(part: Any) -> Any:
    """With copies of all arrays."""
    if isinstance(part, np.ndarray):
        return part.copy()
    if isinstance(part, list):
        return [copied(one) for one in part]
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{field.name: copied(getattr(part, field.name)) for field in fields(part)})
    return part
