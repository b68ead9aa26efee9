"""What of a described model the kernels can run, and what its attention keeps."""

from __future__ import annotations

from dataclasses import dataclass

from tulle.engine.checkpoint import Source
from tulle.errors import UserError
from tulle.models.description import (
    Absent,
    Attention,
    Decoder,
    GatedDeltaNet,
    GatedMLP,
    LatentAttention,
    Mamba2,
    PlainMLP,
    ShortConvolution,
)
from tulle.models.description import Layer as DecoderLayer
from tulle.models.description import Mixture as DecoderMixture
from tulle.models.features import require

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
