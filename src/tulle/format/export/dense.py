"""Export to a plain Hugging Face checkpoint: every weight unpacked, zeros included.

Quantised inputs have no place in it and are dropped. A weight Δ·(u − z) has up to 16 significant bits: bfloat16
and float16 round it, float32 keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tulle.format.export.plan import Plan, linear_entry, unpacked_entries
from tulle.format.spec import LinearSpec
from tulle.models.checkpoint import Checkpoint
from tulle.simulate import dequantise


def plan(checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], dtype: torch.dtype | None) -> Plan:
    """``dtype`` None: that of the checkpoint's own floating-point tensors."""
    weight_dtype = dtype or stored_dtype(checkpoint)
    entries = unpacked_entries(checkpoint, linears, dtype)

    def unpack(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        return dequantise(spec, tensors).to(weight_dtype)

    for name, spec in linears.items():
        entries.append(linear_entry(checkpoint, name, spec, "weight", weight_dtype, spec.shape, unpack))
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(weight_dtype).removeprefix("torch.")
    notes = []
    if any(spec.input_bits for spec in linears.values()):
        notes.append("a dense checkpoint cannot say that inputs are quantised: they are not in the export")
    return Plan(entries, config, weight_dtype, dtype, notes=notes)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config states, else that of the largest floating-point tensor (the embedding)."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(stated), None)
    if isinstance(found, torch.dtype):
        return found
    floating = [i for i in map(checkpoint.info, checkpoint.names()) if i.dtype.is_floating_point]
    return max(floating, key=lambda info: info.bytes).dtype
