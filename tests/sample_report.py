"""A report.json as ``tulle compress`` writes it, made by rule."""

from __future__ import annotations

from typing import Any

import torch

from tulle.core.mask_structure import mask_structure

LINEARS = {
    "self_attn.q_proj": ("qkv", [256, 256]),
    "self_attn.k_proj": ("qkv", [128, 256]),
    "self_attn.v_proj": ("qkv", [128, 256]),
    "self_attn.o_proj": ("o", [256, 256]),
    "mlp.gate_proj": ("gate_up", [768, 256]),
    "mlp.up_proj": ("gate_up", [768, 256]),
    "mlp.down_proj": ("down", [256, 768]),
}


def sample_report(blocks: int = 2, sparse: bool = True, evaluated: bool = True) -> dict[str, Any]:
    linears = []
    for block in range(blocks):
        for number, (name, (role, shape)) in enumerate(LINEARS.items()):
            weights = shape[0] * shape[1]
            packed = weights * (3 if sparse else 4) // 8
            linears.append(
                {
                    "name": f"model.layers.{block}.{name}",
                    "role": role,
                    "block": block,
                    "shape": shape,
                    "bits": 4,
                    "group_size": 128,
                    "symmetric": False,
                    "sparsity": 0.5 if sparse else 0.0,
                    "pattern": None,
                    "input_bits": None,
                    "dense_bytes": 2 * weights,
                    "packed_bytes": packed,
                    "bits_per_weight": 8 * packed / weights,
                    "output_error": 0.001 * (number + 1) * (block + 1),
                    "seconds": 0.5,
                    "notes": ["damping raised from 0.01 to 0.1"] if number == 0 else [],
                }  # fmt: skip
            )
    dense, packed = sum(x["dense_bytes"] for x in linears), sum(x["packed_bytes"] for x in linears)
    return {
        "tulle": "0.1.0",
        "model": "owner/a-model",
        "recipe": {
            "name": "sparse50-w4",
            "description": "Half of the weights, the rest in 4 bits.",
            "calibration": {"samples": 16, "length": 128},
            "steps": [{"sparsegpt": {"sparsity": 0.5, "targets": ["qkv"]}}],
        },
        "seed": 7,
        "calibration": {"source": ["wiki.txt"], "samples": 16, "tokens": 2048, "length": 128},
        "linears": linears,
        "blocks": [{"index": b, "output_error": 0.01 * (b + 1), "seconds": 4.0} for b in range(blocks)],
        "totals": {
            "dense_bytes": dense + 2_000_000, "packed_bytes": packed + 2_000_000, "linear_dense_bytes": dense,
            "linear_packed_bytes": packed, "bits_per_weight": 16 * packed / dense, "sparsity": 0.5 * sparse,
            "parameters": dense // 2 + 1_000_000,
        },  # fmt: skip
        "seconds": {"total": 83.0, "load": 1.0, "forward": 30.0, "write": 2.0, "steps": {"sparsegpt": 40.0}},
        "peak_memory_bytes": 812_000_000,
        "reload": {
            "sequences": 4, "tokens": 508, "predicted_loss": 2.9551, "loss": 2.9552, "difference": 0.0011,
            "allowed": 0.018, "seconds": 0.4,
        },
        "machine": {"cpu": "A CPU", "cores": 2, "isa": "avx512", "python": "3.11.7", "torch": "2.13.0"},
        "evaluation": {
            "protocol": "stories.txt: 100 documents, one sequence each, cut at 512 tokens; BOS first",
            "dense": {"perplexity": 18.3127, "bits_per_byte": 0.9499, "tokens": 17901},
            "compressed": {"perplexity": 19.2044, "bits_per_byte": 0.9652, "tokens": 17901},
        }
        if evaluated
        else None,
    }  # fmt: skip


def sparse_report() -> dict[str, Any]:
    """Three blocks of unequal sparsity with masks (o is left dense, down is 2:4) and channel permutations."""
    report = sample_report(3)
    generator = torch.Generator().manual_seed(0)
    for linear in report["linears"]:
        mask = torch.rand(linear["shape"], generator=generator) < 0.7 - 0.1 * linear["block"]
        if linear["role"] == "o":
            linear |= {"sparsity": 0.0, "mask": None}
            continue
        if linear["role"] == "down":
            mask, linear["pattern"] = torch.arange(768).expand(256, -1) % 4 < 2, "2:4"
        else:
            mask[:, 5] = False
        linear["sparsity"] = 1 - float(mask.float().mean())
        linear["mask"] = mask_structure(mask, linear["pattern"])
    for block in report["blocks"]:
        gain = 0.01 * block["index"]
        block["permutations"] = [
            {"role": "down", "pattern": "2:4", "folded": "up, gate", "kept_before": 0.823, "kept_after": 0.851 + gain,
             "ideal": 0.878, "seconds": 0.41},
            {"role": "o", "pattern": "2:4", "folded": "v_proj", "kept_before": 0.753, "kept_after": 0.8, "ideal": 0.95,
             "seconds": 2.5},
            {"role": "qkv", "pattern": "2:4", "folded": "", "reason": "the residual stream keeps its order"},
        ]  # fmt: skip
    return report
