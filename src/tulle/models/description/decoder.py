"""Layers, and the model that they make; from a config to its description."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from tulle.errors import UserError
from tulle.models.description.feed_forwards import FeedForward, GatedMLP, Mixture
from tulle.models.description.mixers import Attention, Mixer
from tulle.models.description.parts import (
    ROLES,
    Absent,
    Expert,
    Linear,
    LinearGroup,
    Norm,
    Rotary,
)


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
