"""What an exporter decides before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tulle.export.folder import Entry
from tulle.format.spec import LinearSpec
from tulle.models.checkpoint import Checkpoint

InputRule = Literal["none", "compressed-tensors"]


@dataclass
class Plan:
    """The tensors and the config of an export, and what they change with respect to the packed model."""

    entries: list[Entry]
    config: dict[str, Any]
    weight_dtype: torch.dtype
    """Dtype that the dequantised weights pass through."""
    other_dtype: torch.dtype | None
    """Dtype of the tensors that were never packed; None: as stored."""
    input_rule: InputRule = "none"
    """How readers of the export quantise inputs of linears with ``input_bits``."""
    asymmetric_words: bool = False
    """Holds ``pack-quantized`` zero points, which transformers 5.23 with compressed-tensors 0.20 only reads when told
    to dequantise (older ones, such as 5.17 with 0.19, need not be told)."""
    four_bit_floats: bool = False
    """Holds weights that compressed-tensors 0.20 unpacks to bfloat16, whatever the model's dtype is; in a float32 model
    transformers does not run them."""
    notes: list[str] = field(default_factory=list)
    plain: dict[str, torch.dtype] = field(default_factory=dict)
    """Packed linears that are written as plain weights of this dtype, by name."""


def unpacked_entries(
    checkpoint: Checkpoint,
    linears: Mapping[str, LinearSpec],
    dtype: torch.dtype | None,
    names: Iterable[str] | None = None,
) -> list[Entry]:
    """The tensors that are not part of a packed linear, or those of these ``names``, cast to ``dtype`` if given."""
    packed = {f"{name}.{suffix}" for name, spec in linears.items() for suffix in spec.stored_tensors()}
    entries = []
    for name in checkpoint.names() if names is None else names:
        if name not in packed:
            info = checkpoint.info(name)
            kind = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
            entries.append(Entry(name, kind, info.shape, partial(_read, checkpoint, name, kind)))
    return entries


def linear_entry(
    checkpoint: Checkpoint,
    name: str,
    spec: LinearSpec,
    suffix: str,
    dtype: torch.dtype,
    shape: Iterable[int],
    make: Callable[[LinearSpec, Mapping[str, Tensor]], Tensor],
    needs: Collection[str] | None = None,
) -> Entry:
    """``NAME.suffix``, made when its turn comes to be written.

    ``make`` gets the packed tensors of the linear NAME, or those that it ``needs``, by suffix.
    """

    def read_and_make() -> Tensor:
        suffixes = spec.tensors() if needs is None else needs
        tensors = checkpoint.read_many(f"{name}.{s}" for s in suffixes)
        return make(spec, {s: tensors[f"{name}.{s}"] for s in suffixes})

    return Entry(f"{name}.{suffix}", dtype, tuple(shape), read_and_make)


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    return checkpoint.read(name).to(dtype)
