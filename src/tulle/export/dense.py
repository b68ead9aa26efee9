"""Export to a plain Hugging Face checkpoint: every weight unpacked, zeros included.

Quantised inputs have no place in it and are dropped. A weight Δ·(u − z) has up to 16 significant bits: bfloat16
and float16 round it, float32 keeps it. Experts stand as the family's files have them (:mod:`tulle.export.stack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from tulle.core.transform import unfold
from tulle.export.plan import Plan, linear_entry, unpacked_entries
from tulle.export.stack import stacked
from tulle.format.spec import LinearSpec
from tulle.hf.packed_linear import dequantise, transform_of
from tulle.models.checkpoint import Checkpoint


def plan(checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], dtype: torch.dtype | None) -> Plan:
    """``dtype`` None: that of the checkpoint's own floating-point tensors."""
    model = checkpoint.describe()
    # Of another tool's files only what the model needs: old ones hold buffers that transformers has no place for.
    names = None if checkpoint.source.plain else checkpoint.names_of(model)
    weight_dtype = dtype or (stored_dtype(checkpoint) if names is None else _widest(checkpoint, names))
    entries = unpacked_entries(checkpoint, linears, dtype, names)
    for name, spec in linears.items():
        unpack = partial(_unpack, checkpoint, name, weight_dtype)
        entries.append(linear_entry(checkpoint, name, spec, "weight", weight_dtype, spec.shape, unpack))
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(weight_dtype).removeprefix("torch.")
    if config.get("tie_word_embeddings") and not model.tied:
        config["tie_word_embeddings"] = False
    notes = []
    if any(spec.input_bits for spec in linears.values()):
        notes.append("a dense checkpoint cannot say that inputs are quantised: they are not in the export")
    if any(spec.input_sparsity for spec in linears.values()):
        notes.append("a dense checkpoint cannot say which inputs a token keeps: all of them are read in the export")
    if any(spec.transform for spec in linears.values()):
        notes.append("transforms of inputs are multiplied back into the weights")
    if "attention" in (checkpoint.config.get("quantization_config") or {}):
        if checkpoint.config["quantization_config"]["attention"] is not None:
            notes.append("a dense checkpoint cannot say that keys and values are quantised: they are not in the export")
    return Plan(stacked(model, entries), config, weight_dtype, dtype, notes=notes)


def _unpack(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, spec: LinearSpec, tensors: Mapping[str, Tensor]
) -> Tensor:
    return unpacked_weight(checkpoint, name, spec, tensors).to(dtype)


def unpacked_weight(checkpoint: Checkpoint, name: str, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """W ``[C_out, C_in]`` of a packed linear's tensors by suffix, its transforms undone."""
    weight = dequantise(spec, tensors)
    if spec.transform:
        holder = spec.transform_of or name
        maps = [
            transform_of(t, {s: checkpoint.read(f"{holder}.transform.{i}.{s}") for s in t.tensors(spec.shape[1])})
            for i, t in enumerate(spec.transform)
        ]
        weight = unfold(maps, weight)
    return weight


def _widest(checkpoint: Checkpoint, names: Iterable[str]) -> torch.dtype:
    """The dtype that holds every one of these tensors' values."""
    return max((checkpoint.info(name).dtype for name in names), key=lambda dtype: dtype.itemsize)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config states, else that of the largest floating-point tensor (the embedding)."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(stated), None)
    if isinstance(found, torch.dtype):
        return found
    floating = [i for i in map(checkpoint.info, checkpoint.names()) if i.dtype.is_floating_point]
    return max(floating, key=lambda info: info.bytes).dtype
