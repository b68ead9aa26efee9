"""What a checkpoint holds: structure, bits, sparsity and the statistics that make weights hard to quantise.

Reads one tensor at a time, dense or packed (then its dequantised values), so memory is the largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tulle.core.grid import Grid, find_steps, grouped, round_to_grid
from tulle.format.spec import LinearSpec
from tulle.hf.packed_linear import dequantise
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import Decoder

OUTLIER = 4.0
"""An input channel is an outlier if its largest |w| is this many times the median channel's."""
PROBE_BITS, PROBE_GROUP = 4, 128


def inspect_model(folder: str | Path, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """``{"model", "architecture", "linears": [...], "others": [...], "totals", "extreme"}``.

    ``extreme`` is the linear with the largest outlier ratio, with max|w| of each input channel. Raises ``UserError``
    for a broken checkpoint or one of an architecture outside the table.
    """
    checkpoint = Checkpoint.open(folder)
    model, packed = checkpoint.describe(), checkpoint.packed
    specs = packed.linears if packed else {}
    names = [(layer.index, name) for layer in model.layers for name in model.linear_names(layer.index)]
    linears: list[dict[str, Any]] = []
    seen: set[str] = set()
    extreme: dict[str, Any] | None = None
    for done, (block, name) in enumerate(names):
        spec = specs.get(name)
        stored = [f"{name}.{suffix}" for suffix in (spec.tensors() if spec else ("weight",))]
        tensors = {key.rsplit(".", 1)[-1]: tensor for key, tensor in checkpoint.read_many(stored).items()}
        seen.update(stored)
        weight = dequantise(spec, tensors) if spec else tensors["weight"].float()
        row: dict[str, Any] = {"name": name, "role": model.role_of(name), "block": block, "shape": list(weight.shape)}
        row |= _scheme(spec) | {"bytes": sum(checkpoint.info(key).bytes for key in stored)}
        row |= {"bits_per_weight": 8 * row["bytes"] / weight.numel()} | weight_statistics(weight)
        row["stored_as"] = None if spec else checkpoint.info(stored[0]).stored.stored_as
        row["rounding_error"] = None if spec and spec.bits else rounding_error(weight)
        linears.append(row)
        if extreme is None or row["outlier_ratio"] > extreme["outlier_ratio"]:
            extreme = {
                "name": name,
                "outlier_ratio": row["outlier_ratio"],
                "channel_absmax": weight.abs().amax(0).tolist(),
            }
        if progress is not None:
            progress("inspect", done + 1, len(names))
    others = [
        {
            "name": name,
            "shape": list(checkpoint.info(name).shape),
            "dtype": checkpoint.info(name).name,
            "bytes": checkpoint.info(name).bytes,
        }
        for name in checkpoint.names()
        if name not in seen
    ]
    return {
        "model": Path(folder).name,
        "architecture": _architecture(model),
        "linears": linears,
        "others": others,
        "totals": _totals(checkpoint, linears),
        "extreme": extreme,
    }


def weight_statistics(weight: Tensor) -> dict[str, float | int]:
    """Of W ``[C_out, C_in]``: share of exact zeros; spread and kurtosis (3 for a Gaussian) of the others; outliers.

    ``outlier_ratio`` is the largest max|w| of an input channel over the median channel's.
    """
    kept = weight[weight != 0].double()
    variance = float(kept.square().mean() - kept.mean().square()) if len(kept) else 0.0
    fourth = float((kept - kept.mean()).pow(4).mean()) if len(kept) else 0.0
    channels = weight.abs().amax(0)
    median = float(channels.median())
    return {
        "sparsity": 1 - len(kept) / weight.numel(),
        "std": max(variance, 0.0) ** 0.5,
        "absmax": float(channels.max()),
        "kurtosis": fourth / variance**2 if variance > 0 else 0.0,
        "outlier_ratio": float(channels.max()) / median if median > 0 else 0.0,
        "outlier_channels": int((channels > OUTLIER * median).sum()) if median > 0 else 0,
    }


def rounding_error(weight: Tensor) -> float:
    """‖W − Ŵ‖² / ‖W‖² of rounding to nearest in 4 bits, groups of 128 (per channel where 128 does not fit)."""
    grid = Grid(PROBE_BITS, PROBE_GROUP if weight.shape[1] % PROBE_GROUP == 0 else None)
    step, zero = find_steps(weight, grid)
    rounded = round_to_grid(grouped(weight, grid.group_size), step[..., None], zero[..., None], grid).reshape(
        weight.shape
    )
    total = float(weight.double().square().sum())
    return float((weight - rounded).double().square().sum()) / total if total > 0 else 0.0


def _scheme(spec: LinearSpec | None) -> dict[str, Any]:
    if spec is None:
        return {
            "bits": None,
            "group_size": None,
            "symmetric": True,
            "format": "int",
            "pattern": None,
            "input_bits": None,
            "input_sparsity": None,
        }
    return {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "format": spec.format,
        "pattern": spec.pattern,
        "input_bits": spec.input_bits,
        "input_sparsity": None if spec.input_sparsity is None else spec.input_sparsity.to_json(),
    }


def _architecture(model: Decoder) -> dict[str, Any]:
    first = model.layers[0]
    return {
        "type": model.model_type,
        "blocks": len(model.layers),
        "hidden": model.hidden,
        "intermediate": first.feed_forward.intermediate,
        "heads": first.attention.heads,
        "kv_heads": first.attention.kv_heads,
        "head_dim": first.attention.head_dim,
        "vocabulary": model.vocabulary,
        "tied": model.tied,
    }


def _totals(checkpoint: Checkpoint, linears: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(x["shape"][0] * x["shape"][1] for x in linears)
    size = sum(x["bytes"] for x in linears)
    return {
        "bytes": checkpoint.bytes,
        "linear_bytes": size,
        "linear_weights": weights,
        "bits_per_weight": 8 * size / weights,
        "sparsity": sum(x["sparsity"] * x["shape"][0] * x["shape"][1] for x in linears) / weights,
    }
