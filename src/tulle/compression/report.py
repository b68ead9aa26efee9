"""The figures of a run: what ``OUT/report.json`` holds."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from tulle import machine
from tulle.compression.recipe import Recipe
from tulle.compression.run_folder import State
from tulle.compression.walker import PartResult
from tulle.core.mask_structure import mask_structure
from tulle.format.spec import LinearSpec
from tulle.methods.contract import LinearState
from tulle.models.checkpoint import Checkpoint


def run_report(
    checkpoint: Checkpoint, recipe: Recipe, state: State, fingerprint: str, notes: list[str], **facts: Any
) -> dict[str, Any]:
    """The report of a finished run; ``facts`` join it as they are. Times are seconds, sizes bytes."""
    linears = state.linears
    weights = [x["shape"][0] * x["shape"][1] for x in linears]
    packed = sum(x["packed_bytes"] + x["transform_bytes"] for x in linears)
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    steps = {step.name for step in recipe.steps}
    return {
        "tulle": metadata.version("tulle"),
        "fingerprint": fingerprint,
        **facts,
        "recipe": recipe.to_json(),
        "linears": linears,
        "tables": state.tables,
        "blocks": state.blocks,
        "attention": state.attention,
        "notes": notes,
        "totals": {
            "dense_bytes": checkpoint.bytes,
            "linear_dense_bytes": sum(x["dense_bytes"] for x in linears),
            "linear_packed_bytes": packed,
            "packed_bytes": state.packed_bytes,
            "bits_per_weight": 8 * packed / max(sum(weights), 1),
            "sparsity": sum(n * x["sparsity"] for n, x in zip(weights, linears, strict=True)) / max(sum(weights), 1),
            "parameters": sum(info.bytes // info.dtype.itemsize for info in infos),
        },
        "seconds": {k: v for k, v in state.seconds.items() if k not in steps}
        | {"steps": {k: v for k, v in state.seconds.items() if k in steps}},
        "machine": machine.describe(),
        "evaluation": None,
    }


def linear_report(
    linear: LinearState, spec: LinearSpec, index: int, result: PartResult, dtype: torch.dtype
) -> dict[str, Any]:
    """One linear's part of the report; ``dtype`` is that of the checkpoint's weight."""
    return {
        "name": linear.name,
        "role": linear.role,
        "block": index,
        "shape": list(spec.shape),
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "scale_bits": spec.scale_bits,
        "format": spec.format,
        "sparsity": 0.0 if linear.mask is None else 1 - int(linear.mask.sum()) / linear.mask.numel(),
        "pattern": linear.pattern,
        "mask": None if linear.mask is None else mask_structure(linear.mask, linear.pattern),
        "input_bits": linear.input_bits,
        "input_symmetric": spec.input_symmetric,
        "input_clip": spec.input_clip,
        "input_sparsity": None if spec.input_sparsity is None else spec.input_sparsity.to_json(),
        "transform": [t.to_json() for t in spec.transform],
        "transform_bytes": spec.transform_bytes,
        "dense_bytes": linear.weight.numel() * dtype.itemsize,
        "packed_bytes": spec.packed_bytes,
        "bits_per_weight": spec.bits_per_weight,
        "output_error": result.output_errors[linear.name],
        "seconds": result.linear_seconds[linear.name],
        "notes": list(dict.fromkeys(linear.notes)),
    }


def table_report(linear: LinearState, spec: LinearSpec, error: float, seconds: float) -> dict[str, Any]:
    """A quantised embedding's or head's part of the report; ``error`` is ‖W − Ŵ‖²/‖W‖²."""
    dense = linear.dense
    return {
        "name": linear.name,
        "role": linear.role,
        "shape": list(spec.shape),
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "scale_bits": spec.scale_bits,
        "format": spec.format,
        "dense_bytes": dense.numel() * dense.element_size(),
        "packed_bytes": spec.packed_bytes,
        "bits_per_weight": spec.bits_per_weight,
        "weight_error": error,
        "seconds": seconds,
        "notes": linear.notes,
    }
