"""What a model is made of, as data: one description, read by walker, transformers integration and engine.

``describe`` turns a ``config.json`` into a :class:`Decoder`. What is special about a family stands in one file of
``tulle.models.families``; everything else reads only the classes below. This module needs no torch.

Shapes are ``(C_out, C_in)``. Names of a layer's tensors are relative to the layer (``self_attn.q_proj``); its
``prefix`` makes them full (``model.layers.3.``).
"""

from tulle.models.description.decoder import Decoder, InputGate, Layer, PerLayerEmbedding, describe, families
from tulle.models.description.feed_forwards import XIELU, FeedForward, GatedMLP, Mixture, PlainMLP, Router
from tulle.models.description.mixers import Attention, GatedDeltaNet, LatentAttention, Mamba2, Mixer, ShortConvolution
from tulle.models.description.parts import (
    ACTIVATIONS,
    ROLES,
    STREAM_READERS,
    TABLES,
    TARGETS,
    Absent,
    Expert,
    Linear,
    LinearGroup,
    Norm,
    NormKind,
    Producer,
    Rotary,
    RotaryKind,
    expert_role,
    require_plain_values,
    target_of,
)

__all__ = [
    "ACTIVATIONS",
    "Absent",
    "Attention",
    "Decoder",
    "Expert",
    "FeedForward",
    "GatedDeltaNet",
    "GatedMLP",
    "InputGate",
    "LatentAttention",
    "Layer",
    "Linear",
    "LinearGroup",
    "Mamba2",
    "Mixer",
    "Mixture",
    "Norm",
    "NormKind",
    "PerLayerEmbedding",
    "PlainMLP",
    "Producer",
    "ROLES",
    "Rotary",
    "RotaryKind",
    "Router",
    "STREAM_READERS",
    "ShortConvolution",
    "TABLES",
    "TARGETS",
    "XIELU",
    "describe",
    "expert_role",
    "families",
    "require_plain_values",
    "target_of",
]
