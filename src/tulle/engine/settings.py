"""A model as the native engine takes it: from a checkpoint and its packed linears to ``native_model.Model``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.core.paley import base_order, hadamard_block, paley
from tulle.engine.checkpoint import Source
from tulle.engine.native_model import (
    Absorbed,
    CausalConvolution,
    DeltaNet,
    FeedForward,
    Floats,
    Grid,
    Group,
    InputGate,
    Layer,
    LayerInputs,
    Linear,
    LinearFacts,
    Mixture,
    Model,
    NoMixer,
    RotaryTable,
    Router,
    Selection,
    Table,
    Transform,
    WeightKind,
)
from tulle.engine.native_model import LatentAttention as NativeLatentAttention
from tulle.engine.native_model import Mamba2 as NativeMamba2
from tulle.engine.native_model import Norm as NativeNorm
from tulle.engine.native_model import ShortConvolution as NativeShortConvolution
from tulle.engine.prepare import EMBEDDING, EXACT_HEAD, HEAD, LAYER_INPUTS, LAYER_TABLE, absorbed_names
from tulle.errors import UserError
from tulle.format.spec import HeadSpec, LinearSpec
from tulle.models.description import (
    Absent,
    Attention,
    Decoder,
    GatedDeltaNet,
    GatedMLP,
    LatentAttention,
    Mamba2,
    Norm,
    PlainMLP,
    Rotary,
    ShortConvolution,
)
from tulle.models.description import InputGate as DecoderInputGate
from tulle.models.description import Layer as DecoderLayer
from tulle.models.description import Mixture as DecoderMixture
from tulle.models.description import Router as DecoderRouter
from tulle.models.features import require
from tulle.models.rotary import depends_on_length, frequencies

GATES = ("silu", "relu", "relu2", "gelu_tanh", "xielu", "quick_gelu")
"""Activations of feed-forwards that the kernels have."""
FEATURES = frozenset(
    {
        "scale of the embedding",
        "scale of the logits",
        "soft cap of the logits",
        "several rotary tables",
        "rotary embeddings of neighbouring channels",
        "layer norms",
        "norms with an offset",
        "norms with a bias",
        "norms of several eps",
        "norms after attention and feed-forward",
        "no norms before attention and feed-forward",
        "scale of what is added to the residual stream",
        "attention and feed-forward side by side",
        "attention without positions",
        "attention sinks",
        "experts",
        "experts without gates",
        "norms of experts",
        "scales of a router's inputs or of experts",
        "feed-forwards that differ between layers",
        "gates with a limit",
        "gated delta nets",
        "latent attention",
        "heads of delta nets side by side",
        "gated short convolutions",
        "layers of a mixer or a feed-forward alone",
        "Mamba-2",
        "output gate of attention",
        "heads of which only a part is rotated",
        "scale of attention",
        "soft cap of attention",
        "scale of queries by position",
        "norm of values",
        "keys and values of an earlier layer",
        "keys that are the values",
        "kv_heads that differ between layers",
        "head_dim that differ between layers",
        "inputs of every layer's own",
        "scale of the layers' outputs",
        "norm of the heads' outputs",
        "norms of queries and keys over all heads",
        "norms of queries and keys after the rotation",
        "queries, keys and values in one tensor",
        "a feed-forward without gate",
        "gate and up in one tensor",
        "norm inside the feed-forward",
        "activation xielu",
    }
)
"""What the kernels do of :func:`tulle.models.features.features`."""


class Tensors(Protocol):
    """Where the kernels' arrays come from."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> NDArray[Any]: ...


def settings_of(
    source: Source,
    file: Tensors,
    facts: Mapping[str, LinearFacts],
    engine_bits: int,
    blocks: Iterable[int],
    context: int = 1,
) -> Model:
    """The model with these of its blocks, for texts of up to ``context`` tokens; inputs of integer weights that the
    checkpoint leaves unquantised get ``engine_bits`` bits. Raises ``UserError`` for what the engine cannot run."""
    description = source.description
    require_runnable(description)
    first, attention = description.layers[0], source.packed.attention if source.packed else None
    inner, mixer, kept = feed_forward_of(description), attention_of(description), kept_of(source)
    latent = None if latent_of(description) is None else kept[0]
    blocks = list(blocks)
    whole = len(blocks) == len(description.layers)
    linears = _Linears(source, file, facts, engine_bits)
    layers = []
    tables = list(description.rotary)
    for index in blocks:
        layer = description.layers[index]
        groups: dict[str, Any] = {"qkv": None, "o": None, "feed_forward": None}
        if not isinstance(layer.mixer, Absent):
            groups |= {role: linears.group(names_of(layer, role)) for role in ("qkv", "o")}
        if isinstance(layer.feed_forward, DecoderMixture):
            groups["mixture"] = _mixture(source, linears, layer, layer.feed_forward)
        elif not isinstance(layer.feed_forward, Absent):
            groups["feed_forward"] = _feed_forward(linears, layer, layer.feed_forward.intermediate)
        norms = {
            "input_norm": (layer.mixer_norm, description.hidden),
            "post_norm": (layer.feed_forward_norm, description.hidden),
            "attention_after": (layer.mixer_norm_after, description.hidden),
            "feed_forward_after": (layer.feed_forward_norm_after, description.hidden),
            "inner_norm": (layer.feed_forward.inner_norm, layer.feed_forward.intermediate),
        }
        own: dict[str, Any] = {}
        if isinstance(layer.mixer, GatedDeltaNet | ShortConvolution | Mamba2):
            own["recurrent"] = _recurrent(source, layer.mixer, layer.prefix)
        elif isinstance(layer.mixer, Absent):
            own["recurrent"] = NoMixer()
        elif isinstance(layer.mixer, LatentAttention):
            own["latent"] = _latent(source, linears, layer, layer.mixer)
        else:
            norms |= _head_norms(layer.attention)
            own |= _attention(source, layer.attention, layer.prefix)
        if layer.input_gate is not None and whole:
            own["input_gate"] = _input_gate(source, linears, layer, layer.input_gate)
        if layer.output_scale is not None:
            own["output_scale"] = float(source.floats(layer.prefix + layer.output_scale, (1,))[0])
        own["rotary"] = -1 if layer.mixer.rotary is None else tables.index(layer.mixer.rotary)
        read: dict[str, Any] = {key: _norm(source, norm, layer.prefix, size) for key, (norm, size) in norms.items()}
        layers.append(Layer(activation=_xielu(source, layer), **own, **read, **groups))
    head = description.embedding if description.tied else description.head
    rotated = {one.key_dim for one in kept} if attention and attention.hadamard else set[int]()
    beta, length = mixer.position_scale or (0.0, 0)
    final = _norm(source, description.final_norm, "", description.hidden)
    assert final is not None
    return Model(
        hidden=description.hidden,
        heads=mixer.heads,
        kv_heads=latent.heads if latent else 0,
        head_dim=latent.key_dim if latent else 0,
        value_dim=latent.value_dim if latent else 0,
        vocabulary=description.vocabulary,
        gate=inner.activation,
        gated=isinstance(inner, GatedMLP),
        gate_limit=(inner.limit or 0.0) if isinstance(inner, GatedMLP) else 0.0,
        up_offset=inner.up_offset if isinstance(inner, GatedMLP) else 0.0,
        parallel=first.parallel,
        residual_scale=first.residual_scale,
        embedding_scale=description.embedding_scale,
        logit_scale=description.logit_scale,
        logit_cap=description.logit_soft_cap or 0.0,
        attention_scale=mixer.scale or 0.0,
        attention_cap=mixer.soft_cap or 0.0,
        output_gate=mixer.output_gate,
        norm_all_heads=mixer.norm_width == "all",
        norm_after_rotary=mixer.norm_after_rotary,
        position_beta=beta,
        position_length=length,
        rotary=[_rotary(table, context) for table in description.rotary.values()],
        query=_head_grid(attention.query if attention else None),
        key=_head_grid(attention.key if attention else None),
        value=_head_grid(attention.value if attention else None),
        head_rotations=[hadamard(dim, block) for dim in sorted(rotated) if (block := hadamard_block(dim)) > 1],
        embedding=_embedding(source, linears, facts),
        layer_inputs=_layer_inputs(source, linears, facts) if whole else None,
        layers=layers,
        norm=final,
        head=Group([], [linears.linear([head.removesuffix(".weight")], HEAD, None)]),
        exact_head=_exact_head(source, linears, facts),
    )


@dataclass(frozen=True)
class Kept:
    """Keys and values of a token in one layer."""

    heads: int
    key_dim: int
    value_dim: int


def kept_of(source: Source) -> list[Kept]:
    """What the layers keep that attend to keys and values of their own."""
    return [
        _kept(layer.mixer, bool(source.absorbed))
        for layer in source.description.layers
        if isinstance(layer.mixer, LatentAttention)
        or isinstance(layer.mixer, Attention)
        and layer.mixer.kv_from is None
    ]


def _kept(mixer: Attention | LatentAttention, absorbed: bool) -> Kept:
    if isinstance(mixer, Attention):
        return Kept(mixer.kv_heads, mixer.head_dim, mixer.head_dim)
    if absorbed:
        return Kept(1, mixer.rotary_dim, mixer.kv_rank)
    return Kept(mixer.heads, mixer.plain_dim + mixer.rotary_dim, mixer.value_dim)


def latent_of(model: Decoder) -> LatentAttention | None:
    """The latent attention that layers have, if they have one."""
    return next((layer.mixer for layer in model.layers if isinstance(layer.mixer, LatentAttention)), None)


def attention_of(model: Decoder) -> Attention:
    """The attention that layers have, those that have one; of latent attention one of as many heads and the same scale.
    Raises ``UserError`` where none has."""
    found = next((layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)), None)
    if found is None and (latent := latent_of(model)) is not None:
        return Attention(latent.heads, latent.heads, latent.plain_dim + latent.rotary_dim, scale=latent.scale)
    if found is None:
        require(model, FEATURES, "the engine", "use transformers for it")
        raise UserError("expected a model with attention in one layer at least, found none; use transformers for it")
    return found


def inner_of(layer: DecoderLayer) -> GatedMLP | PlainMLP | None:
    """A layer's feed-forward, or what its experts are alike in; None where it has none."""
    found = layer.feed_forward
    found = found.expert if isinstance(found, DecoderMixture) else found
    return None if isinstance(found, Absent) else found


def feed_forward_of(model: Decoder) -> GatedMLP | PlainMLP:
    """The feed-forward that layers have, those that have one. Raises ``UserError`` where none has."""
    found = next((inner for layer in model.layers if (inner := inner_of(layer)) is not None), None)
    if found is None:
        raise UserError("expected a model with a feed-forward in one layer at least, found none; use transformers")
    return found


def names_of(layer: DecoderLayer, role: str) -> list[str]:
    """Full names of a group's linears."""
    return [layer.prefix + name for name in layer.group(role).names]


def _feed_forward(linears: _Linears, layer: DecoderLayer, intermediate: int) -> FeedForward:
    return FeedForward(intermediate, *(linears.group(names_of(layer, role)) for role in ("gate_up", "down")))


def _mixture(source: Source, linears: _Linears, layer: DecoderLayer, mixture: DecoderMixture) -> Mixture:
    router = mixture.router
    correction = None
    if router.correction is not None:
        correction = source.floats(layer.prefix + router.correction, (router.experts,))
    experts = [
        FeedForward(
            mixture.expert.intermediate,
            *(linears.group([layer.prefix + name for name in group.names]) for group in expert.groups),
        )
        for expert in layer.experts
    ]
    shared = None if mixture.shared is None else _feed_forward(linears, layer, mixture.shared.intermediate)
    scales = None
    if router.expert_scale is not None:
        scales = source.floats(layer.prefix + router.expert_scale, (router.experts,))
    norms = (
        _norm(source, norm, layer.prefix, layer.hidden)
        for norm in (mixture.expert_norm, mixture.shared_norm_after, mixture.experts_norm_after)
    )
    return Mixture(
        Router(
            linears.group(names_of(layer, "router")),
            router.chosen,
            router.score,
            router.normalise,
            router.scale,
            correction,
            router.groups,
            router.chosen_groups,
            router.group_best,
            scales,
            _router_norm(source, layer, router),
        ),
        experts,
        shared,
        mixture.shared_gate is not None,
        *norms,
    )


def _router_norm(source: Source, layer: DecoderLayer, router: DecoderRouter) -> NativeNorm | None:
    """Of a router that reads the stream x as x/√(mean x² + ε)·scale/√d."""
    if router.input_scale is None:
        return None
    gain = source.floats(layer.prefix + router.input_scale, (layer.hidden,)) * np.float32(layer.hidden**-0.5)
    return NativeNorm(np.ascontiguousarray(gain), None, router.input_eps, False)


def _latent(source: Source, linears: _Linears, layer: DecoderLayer, mixer: LatentAttention) -> NativeLatentAttention:
    query_norm = _norm(source, mixer.query_norm, layer.prefix, mixer.query_rank or 0)
    norm = _norm(source, mixer.kv_norm, layer.prefix, mixer.kv_rank)
    assert norm is not None
    (name,) = names_of(layer, "kv_up")
    absorbs = name in source.absorbed
    return NativeLatentAttention(
        query_rank=mixer.query_rank or 0,
        rank=mixer.kv_rank,
        plain=mixer.plain_dim,
        rotary=mixer.rotary_dim,
        value=mixer.value_dim,
        query_norm=query_norm,
        norm=norm,
        query_up=None if mixer.query_rank is None else linears.group(names_of(layer, "q_up")),
        kv_up=None if absorbs else linears.group([name]),
        absorbed=linears.absorbed(name, mixer) if absorbs else None,
    )


def _attention(source: Source, mixer: Attention, prefix: str) -> dict[str, Any]:
    """What attention has besides linears and norms with gains."""
    ones = np.ones(mixer.head_dim, np.float32)
    return {
        "kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "kv_from": -1 if mixer.kv_from is None else mixer.kv_from,
        "value_is_key": mixer.value_is_key,
        "value_norm": None if mixer.value_eps is None else NativeNorm(ones, None, mixer.value_eps, False),
        "window": mixer.window or 0,
        "sinks": _sinks(source, mixer, prefix),
    }


def _input_gate(source: Source, linears: _Linears, layer: DecoderLayer, gate: DecoderInputGate) -> InputGate:
    norm = _norm(source, gate.norm, layer.prefix, layer.hidden)
    assert norm is not None
    first, last = (linears.group(names_of(layer, role)) for role in ("input_gate", "input_down"))
    return InputGate(first, last, norm)


def _layer_inputs(source: Source, linears: _Linears, facts: Mapping[str, LinearFacts]) -> LayerInputs | None:
    """Inputs of every layer's own; of a table in floats the rows that the model has tokens for."""
    own, model = source.description.per_layer, source.description
    if own is None:
        return None
    name, norm = own.table, _norm(source, own.norm, "", own.width)
    assert norm is not None
    table: Table | Linear
    if LAYER_TABLE in facts:
        table = linears.linear([name.removesuffix(".weight")], LAYER_TABLE, None)
    else:
        shape = own.tensors(len(model.layers), model.hidden)[name]
        numbers = source.kernel_floats(name, shape)[: model.vocabulary]
        table = Table(WeightKind.BF16 if numbers.dtype == np.uint16 else WeightKind.F32, numbers.reshape(-1))
    projection = linears.linear([own.projection.removesuffix(".weight")], LAYER_INPUTS, None)
    return LayerInputs(own.width, table, Group([], [projection]), norm)


def _sinks(source: Source, mixer: Attention, prefix: str) -> Floats | None:
    if not mixer.sinks:
        return None
    return np.ascontiguousarray(source.floats(f"{prefix}{mixer.name}.sinks", (mixer.heads,)))


def _head_norms(mixer: Attention) -> dict[str, tuple[Norm | None, int]]:
    """Of queries, keys and outputs, with their widths."""
    queries, keys, _ = mixer.widths if mixer.norm_width == "all" else (mixer.head_dim,) * 3
    return {
        "query_norm": (mixer.q_norm, queries),
        "key_norm": (mixer.k_norm, keys),
        "output_norm": (mixer.output_norm, mixer.widths[0]),
    }


def _recurrent(
    source: Source, mixer: GatedDeltaNet | ShortConvolution | Mamba2, prefix: str
) -> DeltaNet | NativeShortConvolution | NativeMamba2:
    """What a mixer has beside its linears."""
    own = {
        name.removeprefix(f"{mixer.name}."): source.floats(prefix + name, shape)
        for name, shape in mixer.parameters.items()
    }
    if isinstance(mixer, ShortConvolution):
        return NativeShortConvolution(_convolution(own, "conv", silu=False))
    convolution = _convolution(own, "conv1d", silu=True)
    decay, step_bias = -np.exp(own["A_log"]), np.ascontiguousarray(own["dt_bias"])
    norm = NativeNorm(np.ascontiguousarray(own["norm.weight"]), None, mixer.eps, False)
    if isinstance(mixer, Mamba2):
        least, most = mixer.step_limits
        return NativeMamba2(
            heads=mixer.heads,
            head_dim=mixer.head_dim,
            groups=mixer.groups,
            state=mixer.state,
            convolution=convolution,
            decay=decay,
            step_bias=step_bias,
            skip=np.ascontiguousarray(own["D"]),
            least=least,
            most=most,
            norm=norm,
        )
    return DeltaNet(
        key_heads=mixer.key_heads,
        value_heads=mixer.value_heads,
        key_dim=mixer.key_dim,
        value_dim=mixer.value_dim,
        convolution=convolution,
        decay=decay,
        step_bias=step_bias,
        norm=norm,
    )


def _convolution(own: Mapping[str, Floats], name: str, silu: bool) -> CausalConvolution:
    taps, bias = own[f"{name}.weight"][:, 0], own.get(f"{name}.bias")
    return CausalConvolution(
        channels=len(taps),
        kernel=taps.shape[1],
        taps=np.ascontiguousarray(taps.T).reshape(-1),
        bias=None if bias is None else np.ascontiguousarray(bias),
        silu=silu,
    )


def _norm(source: Source, norm: Norm | None, prefix: str, size: int) -> NativeNorm | None:
    """A norm, its offset added to the gain."""
    if norm is None:
        return None
    name = prefix + norm.name
    gain = source.floats(f"{name}.weight", (size,)) + np.float32(norm.offset)
    bias = source.floats(f"{name}.bias", (size,)) if norm.bias else None
    return NativeNorm(np.ascontiguousarray(gain), bias, norm.eps, norm.kind == "layer")


def _xielu(source: Source, layer: DecoderLayer) -> list[float]:
    """α_p, α_n, β and ε of the layer's activation; none of others."""
    inner = inner_of(layer)
    if inner is None or inner.activation != "xielu":
        return []
    numbers = {
        name.rpartition(".")[2]: float(source.floats(layer.prefix + name, shape).reshape(-1)[0])
        for name, shape in layer.others().items()
    }
    beta = numbers["beta"]
    positive, negative = (float(np.logaddexp(0.0, numbers[name])) for name in ("alpha_p", "alpha_n"))
    return [positive, beta + negative, beta, numbers["eps"]]


def _rotary(table: Rotary, context: int) -> RotaryTable:
    inverse, scale = rotary_frequencies(table, context)
    return RotaryTable(inverse.tolist(), scale, table.interleaved)


def _embedding(source: Source, linears: _Linears, facts: Mapping[str, LinearFacts]) -> Table | Linear:
    """In floats as it is stored; of codes those of its own, or the head's, which are the same."""
    name = source.embedding_name()
    if source.coded_bits(name) is None:
        return _table(source, name)
    return linears.linear([name.removesuffix(".weight")], EMBEDDING if EMBEDDING in facts else HEAD, None)


def _exact_head(source: Source, linears: _Linears, facts: Mapping[str, LinearFacts]) -> Table | Linear | None:
    """What is finer than the head: None where that is as it was stored."""
    name = source.head_name()
    if source.coded_bits(name) is None:
        return _table(source, name) if facts[HEAD].kind.is_codes else None
    if EXACT_HEAD in facts:
        return linears.linear([name.removesuffix(".weight")], EXACT_HEAD, None)
    if source.description.tied and EMBEDDING in facts:
        return linears.linear([name.removesuffix(".weight")], EMBEDDING, None)
    return None


class _Linears:
    """Packed linears with what belongs to them."""

    def __init__(self, source: Source, file: Tensors, facts: Mapping[str, LinearFacts], engine_bits: int):
        self._source, self._file, self._facts, self._engine_bits = source, file, facts, engine_bits

    def group(self, names: Sequence[str]) -> Group:
        """Linears that share an input, by their full names."""
        specs = self._source.specs
        spec = specs.get(names[0])
        if any((s.transform if (s := specs.get(n)) else ()) != (spec.transform if spec else ()) for n in names):
            raise UserError(f"expected the same transforms in front of {', '.join(names)}, found different ones")
        transforms = transforms_of(spec, self._source, spec.transform_of or names[0]) if spec else []
        if all(name in self._facts for name in names):
            linears = [self.linear([name], name, specs.get(name)) for name in names]
        else:  # fused, under the first one's name
            linears = [self.linear(names, names[0], spec)]
        first = linears[0].selection
        for found in (one.selection for one in linears[1:]):
            if found and first and _equal(found.score, first.score):
                found.score = first.score  # the same array: linears that see the same inputs share them
        return Group(transforms, linears)

    def absorbed(self, name: str, mixer: LatentAttention) -> Absorbed:
        """What is made of a linear that gives keys and values."""
        spec = self._source.specs.get(name)
        rounded = spec is not None and spec.input_bits is not None
        keys, values = (
            self._piece(key, Grid(16 if rounded else self._engine_bits), engine_grid=True)
            for key in absorbed_names(name)
        )
        factors = self._array(absorbed_names(name)[0], "factors")
        return Absorbed(
            transforms=transforms_of(spec, self._source, spec.transform_of or name) if spec else [],
            input=_model_grid(spec) or Grid(),
            selection=selection(self._source, name, spec),
            keys=keys,
            values=values,
            parts=1 if factors is None else factors.size // (mixer.heads * mixer.plain_dim),
            factors=factors,
        )

    def linear(self, names: Sequence[str], key: str, spec: LinearSpec | None) -> Linear:
        """``names``: of the linears that are fused in it; ``key``: the name of its facts and arrays."""
        grid = _model_grid(spec)
        found = self._piece(key, grid or Grid(self._engine_bits), engine_grid=grid is None)
        found.bias, found.selection = bias_of(self._source, names), selection(self._source, names[0], spec)
        return found

    def _piece(self, key: str, grid: Grid, engine_grid: bool) -> Linear:
        """A linear without what a checkpoint has beside its weights; floats are given no grid of the engine's."""
        facts = self._facts[key]
        own = engine_grid and facts.kind.is_codes
        return Linear(
            facts=facts,
            values=self._array(key, "values"),
            masks=self._array(key, "masks"),
            offsets=self._array(key, "offsets"),
            starts=self._array(key, "starts"),
            scales=self._array(key, "scales"),
            row_scales=self._array(key, "row_scales"),
            zeros=self._array(key, "zeros"),
            minima=self._array(key, "minima"),
            bias=None,
            input=grid if own or not engine_grid else Grid(),
            engine_grid=own,
            selection=None,
        )

    def _array(self, key: str, suffix: str) -> Any:
        name = f"{key}.{suffix}"
        return self._file.tensor(name) if name in self._file else None


def _model_grid(spec: LinearSpec | None) -> Grid | None:
    """In which a recipe quantises a linear's inputs; None where it does not."""
    if spec is None or spec.input_bits is None:
        return None
    return Grid(spec.input_bits, spec.input_symmetric, spec.input_clip)


def _equal(a: Floats | None, b: Floats | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def bias_of(source: Source, names: Sequence[str]) -> Floats | None:
    """``[rows]`` of linears that are fused; None where the description gives none of them one. Biases that are stored
    though the config denies them are not read, as in transformers."""
    if not any(name in source.biased for name in names):
        return None
    return np.concatenate([
        source.floats(f"{name}.bias", source.shapes[name][:1]) if name in source.biased
        else np.zeros(source.shapes[name][0], np.float32)
        for name in names
    ])  # fmt: skip


def selection(source: Source, name: str, spec: LinearSpec | None) -> Selection | None:
    """Which inputs a linear sees."""
    found = None if spec is None else spec.input_sparsity
    if spec is None or found is None:
        return None
    columns = spec.shape[1]
    return Selection(
        kind=found.kind,
        keep=found.keep or 0,
        block=found.block or columns,
        unit=found.unit,
        norm=found.by == "norm",
        threshold=found.threshold or 0.0,
        rescale=found.rescale,
        score=source.floats(f"{name}.input_score", (columns,)) if found.weighted else None,
    )


def _table(source: Source, name: str) -> Table:
    """Embedding or head as it is stored: bits of bfloat16, or float32."""
    values = source.kernel_floats(name, (source.description.vocabulary, source.description.hidden))
    return Table(WeightKind.BF16 if source.dtype(name) == "BF16" else WeightKind.F32, values.reshape(-1))


def _head_grid(spec: HeadSpec | None) -> Grid:
    return Grid() if spec is None else Grid(spec.bits, spec.symmetric, spec.clip)


def rotary_frequencies(rotary: Rotary, context: int = 1) -> tuple[NDArray[np.float32], float]:
    """Frequencies ``[dim/2]`` for texts of up to ``context`` tokens, and the factor on cosines and sines.

    Of longrope, all texts have the long factors where some may be longer than those of the first training: one that
    grows beyond that length keeps its keys. Raises ``UserError`` for another table that differs between short and long
    texts."""
    if rotary.kind == "longrope":
        return frequencies(rotary, context)
    found = frequencies(rotary, 1)
    if depends_on_length(rotary) and not np.array_equal(found[0], frequencies(rotary, context)[0]):
        raise UserError(
            f"expected a context of at most {rotary.max_positions} tokens, beyond which rope_type {rotary.kind!r} "
            f"changes all positions, found {context}; set a shorter --context, or evaluate with --backend torch"
        )
    return found


def require_runnable(model: Decoder) -> None:
    """Raises ``UserError`` for what a description asks for and the kernels do not do."""
    require(model, FEATURES, "the engine", "use transformers for it")
    for layer in model.layers:
        first = feed_forward_of(model)
        inner = inner_of(layer) or first
        if inner.activation not in GATES:
            raise UserError(
                f"expected a model that the engine can run, found activation {inner.activation}; use transformers for "
                "it"
            )
        own = {key: getattr(inner, key, None) for key in ("activation", "limit", "up_offset")}
        if type(inner) is not type(first) or any(getattr(first, key, None) != value for key, value in own.items()):
            raise UserError("expected feed-forwards alike but for their widths, found others; use transformers for it")
        if layer.input_gate is not None and layer.input_gate.activation != first.activation:
            raise UserError(
                f"expected one activation in a model, found {layer.input_gate.activation} of layers' own inputs beside "
                f"{first.activation}; use transformers for it"
            )
        if isinstance(layer.mixer, ShortConvolution | Absent):
            continue
        if (latent := latent_of(model)) is not None:
            if layer.mixer != latent:
                raise UserError(
                    f"expected latent attention alike in all layers, found another mixer in layer {layer.index}; use "
                    "transformers for it"
                )
            continue
        if isinstance(layer.mixer, GatedDeltaNet | Mamba2):
            if layer.mixer.activation != "silu":
                raise UserError(
                    f"expected silu behind the convolution of a recurrent mixer, found {layer.mixer.activation}; use "
                    "transformers for it"
                )
            continue
        for key in ("scale", "soft_cap", "position_scale", "norm_width", "norm_after_rotary", "output_gate"):
            if getattr(layer.mixer, key) != getattr(attention_of(model), key):
                raise UserError(
                    f"expected layers alike, found {key} of attention that differs; use transformers for it"
                )


def transforms_of(spec: LinearSpec, source: Source, name: str) -> list[Transform]:
    """The transforms in front of a linear; ``name`` holds their tensors."""
    return [
        transform(t.to_json(), spec.shape[1], {
            suffix: source.tensor(f"{name}.transform.{number}.{suffix}", shape)
            for suffix, (_, shape) in t.tensors(spec.shape[1]).items()
        })
        for number, t in enumerate(spec.transform)
    ]  # fmt: skip


def transform(spec: Mapping[str, Any], channels: int, tensors: Mapping[str, NDArray[Any]]) -> Transform:
    """One transform: its sizes and numbers, in float32."""
    kind = spec["kind"]
    numbers = {suffix: t.astype(np.float32) for suffix, t in tensors.items() if t.dtype != np.int32}
    if kind == "diagonal":
        return Transform(kind, channels, numbers=numbers["scale"].reshape(-1))
    if kind == "permutation":
        return Transform(kind, channels, index=np.ascontiguousarray(tensors["index"]))
    if kind == "block_matrix":
        matrix = numbers["matrix"].reshape(-1)
        return Transform(kind, channels, block=spec["block"], shared=spec["shared"], numbers=matrix)
    if kind == "kronecker":
        both = np.concatenate([numbers["left"].T.reshape(-1), numbers["right"].reshape(-1)])
        return Transform(kind, channels, left=spec["left"], right=spec["right"], numbers=both)
    return hadamard(channels, spec["block"])


def hadamard(channels: int, block: int) -> Transform:
    """A Hadamard transform of blocks of so many channels; the order's factor m that is no power of two has H_mᵀ."""
    base = base_order(block)
    if base is None:
        raise UserError(f"expected a Hadamard order, found a block of {block} channels; the file is broken")
    matrix = np.ascontiguousarray(paley(base).T.astype(np.float32)).reshape(-1) if base > 1 else None
    return Transform("hadamard", channels, block=block, base=base, numbers=matrix)
