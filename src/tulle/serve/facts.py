"""What a model is, for the page and for people: parameters, bits, sparsity, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulle.engine.checkpoint import Source
from tulle.errors import UserError
from tulle.models.source import TensorSource, open_source


@dataclass
class Facts:
    """What ``/v1/tulle/info`` says of a loaded model."""

    name: str
    model_type: str = ""
    parameters: int | None = None
    """Weights of all tensors, pruned ones counted."""
    bits_per_weight: float | None = None
    """Of the linears: stored bits, scales and masks included, per weight."""
    sparsity: float | None = None
    """Share of the linears' weights that are pruned."""
    file_bytes: int | None = None
    """Of all tensors."""
    weight_bytes: int = 0
    """Of weights that one token reads."""
    cache_bytes: int = 0
    """Of keys and values, once the cache is full."""
    context: int = 0
    threads: int = 0
    sequences: int = 0
    layout: str = ""
    cache: str = ""
    chat: bool = False
    """It has a chat template."""
    tools: bool = False
    """Its chat template knows tools."""
    reasoning: bool = False
    """It marks what it thinks."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling settings where a request gives none."""


def file_bytes(folder: Path) -> int:
    """Of a model's tensors, without reading them. Raises ``UserError`` for a folder that is no model."""
    source = open_source(folder)
    return sum(source.info(name).bytes for name in source.names())


def read_facts(name: str, folder: Path) -> Facts:
    """As far as the files tell."""
    source = open_source(folder)
    facts = Facts(name, str(source.config.get("model_type", "")))
    facts.file_bytes = sum(source.info(tensor).bytes for tensor in source.names())
    try:
        _read_linears(facts, source)
    except UserError:  # no decoder: a Scaling Transformer
        facts.parameters = sum(math.prod(source.info(tensor).shape) for tensor in source.names())
    return facts


def _read_linears(facts: Facts, stored: TensorSource) -> None:
    source = Source(stored)
    weights, bits, zeros = 0, 0.0, 0
    for linear, shape in source.shapes.items():
        size = math.prod(shape)
        weights += size
        spec = source.specs.get(linear)
        if spec is None:
            bits += 8 * stored.info(f"{linear}.weight").bytes
        else:
            bits += spec.bits_per_weight * size
            zeros += size - spec.nonzeros if spec.sparse and spec.nonzeros is not None else 0
    inside = tuple(f"{linear}." for linear in source.shapes)
    rest = [tensor for tensor in stored.names() if not tensor.startswith(inside)]
    facts.parameters = weights + sum(math.prod(stored.info(tensor).shape) for tensor in rest)
    if weights:
        facts.bits_per_weight, facts.sparsity = bits / weights, zeros / weights
