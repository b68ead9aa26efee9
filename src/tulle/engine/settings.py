"""A model as the native engine takes it: from a checkpoint and its packed linears to ``native_model.Model``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tulle.core.paley import hadamard_block
from tulle.engine.checkpoint import Source
from tulle.engine.linears import Linears, Tensors, hadamard, names_of
from tulle.engine.mixers import attention_parts, head_norms, latent_attention, norm_of, recurrent, rotary_table
from tulle.engine.native_model import (
    FeedForward,
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
    Router,
    Table,
    WeightKind,
)
from tulle.engine.native_model import Norm as NativeNorm
from tulle.engine.prepare import EMBEDDING, EXACT_HEAD, HEAD, LAYER_INPUTS, LAYER_TABLE
from tulle.engine.runnable import attention_of, feed_forward_of, inner_of, kept_of, latent_of, require_runnable
from tulle.format.spec import HeadSpec
from tulle.models.description import Absent, GatedDeltaNet, GatedMLP, LatentAttention, Mamba2, ShortConvolution
from tulle.models.description import InputGate as DecoderInputGate
from tulle.models.description import Layer as DecoderLayer
from tulle.models.description import Mixture as DecoderMixture
from tulle.models.description import Router as DecoderRouter


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
    linears = Linears(source, file, facts, engine_bits)
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
            own["recurrent"] = recurrent(source, layer.mixer, layer.prefix)
        elif isinstance(layer.mixer, Absent):
            own["recurrent"] = NoMixer()
        elif isinstance(layer.mixer, LatentAttention):
            own["latent"] = latent_attention(source, linears, layer, layer.mixer)
        else:
            norms |= head_norms(layer.attention)
            own |= attention_parts(source, layer.attention, layer.prefix)
        if layer.input_gate is not None and whole:
            own["input_gate"] = _input_gate(source, linears, layer, layer.input_gate)
        if layer.output_scale is not None:
            own["output_scale"] = float(source.floats(layer.prefix + layer.output_scale, (1,))[0])
        own["rotary"] = -1 if layer.mixer.rotary is None else tables.index(layer.mixer.rotary)
        read: dict[str, Any] = {key: norm_of(source, norm, layer.prefix, size) for key, (norm, size) in norms.items()}
        layers.append(Layer(activation=_xielu(source, layer), **own, **read, **groups))
    head = description.embedding if description.tied else description.head
    rotated = {one.key_dim for one in kept} if attention and attention.hadamard else set[int]()
    beta, length = mixer.position_scale or (0.0, 0)
    final = norm_of(source, description.final_norm, "", description.hidden)
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
        rotary=[rotary_table(table, context) for table in description.rotary.values()],
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


def _feed_forward(linears: Linears, layer: DecoderLayer, intermediate: int) -> FeedForward:
    return FeedForward(intermediate, *(linears.group(names_of(layer, role)) for role in ("gate_up", "down")))


def _mixture(source: Source, linears: Linears, layer: DecoderLayer, mixture: DecoderMixture) -> Mixture:
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
        norm_of(source, norm, layer.prefix, layer.hidden)
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


def _input_gate(source: Source, linears: Linears, layer: DecoderLayer, gate: DecoderInputGate) -> InputGate:
    norm = norm_of(source, gate.norm, layer.prefix, layer.hidden)
    assert norm is not None
    first, last = (linears.group(names_of(layer, role)) for role in ("input_gate", "input_down"))
    return InputGate(first, last, norm)


def _layer_inputs(source: Source, linears: Linears, facts: Mapping[str, LinearFacts]) -> LayerInputs | None:
    """Inputs of every layer's own; of a table in floats the rows that the model has tokens for."""
    own, model = source.description.per_layer, source.description
    if own is None:
        return None
    name, norm = own.table, norm_of(source, own.norm, "", own.width)
    assert norm is not None
    table: Table | Linear
    if LAYER_TABLE in facts:
        table = linears.linear([name.removesuffix(".weight")], LAYER_TABLE, None)
    else:
        table = _table(source, name, own.tensors(len(model.layers), model.hidden)[name])
    projection = linears.linear([own.projection.removesuffix(".weight")], LAYER_INPUTS, None)
    return LayerInputs(own.width, table, Group([], [projection]), norm)


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


def _embedding(source: Source, linears: Linears, facts: Mapping[str, LinearFacts]) -> Table | Linear:
    """In floats as it is stored; of codes those of its own, or the head's, which are the same."""
    name = source.embedding_name()
    if source.coded_bits(name) is None:
        return _table(source, name, (source.description.vocabulary, source.description.hidden))
    return linears.linear([name.removesuffix(".weight")], EMBEDDING if EMBEDDING in facts else HEAD, None)


def _exact_head(source: Source, linears: Linears, facts: Mapping[str, LinearFacts]) -> Table | Linear | None:
    """What is finer than the head: None where that is as it was stored."""
    name = source.head_name()
    if source.coded_bits(name) is None:
        shape = source.description.vocabulary, source.description.hidden
        return _table(source, name, shape) if facts[HEAD].kind.is_codes else None
    if EXACT_HEAD in facts:
        return linears.linear([name.removesuffix(".weight")], EXACT_HEAD, None)
    if source.description.tied and EMBEDDING in facts:
        return linears.linear([name.removesuffix(".weight")], EMBEDDING, None)
    return None


def _table(source: Source, name: str, shape: tuple[int, ...]) -> Table:
    """A table as it is stored, bits of bfloat16 or float32; the rows that the model has tokens for."""
    values = source.kernel_floats(name, shape)[: source.description.vocabulary]
    return Table(WeightKind.BF16 if source.dtype(name) == "BF16" else WeightKind.F32, values.reshape(-1))


def _head_grid(spec: HeadSpec | None) -> Grid:
    return Grid() if spec is None else Grid(spec.bits, spec.symmetric, spec.clip)
