"""What the terminal's tables and the pages share: numbers of a report as cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tulle.report import units

DEMO_COLUMNS = (
    ("recipe", "name"), ("size", "size"), ("smaller", "ratio"), ("bits/weight", "bits"), ("sparsity", "sparsity"),
    ("bits/byte", "bits_per_byte"), ("perplexity", "perplexity"), ("tokens/s", "speed"),
    ("× dense", "speedup"), ("time", "seconds"),
)  # fmt: skip
"""Of the demo's tables: heading, and the key of :func:`row_cells`."""


def scheme(linear: Mapping[str, Any]) -> str:
    """``W4 g128 asym, A8, 77 inputs``: how the numbers of a linear and of its input are stored, and which it reads."""
    read = chosen(linear.get("input_sparsity"))
    return f"{_numbers(linear)}, {read}" if read else _numbers(linear)


def chosen(sparsity: Mapping[str, Any] | None) -> str:
    """``16 of 32 inputs by 4``, ``|x| > 0.12`` or ``x > 0``: which inputs a token keeps; "" if all."""
    if sparsity is None:
        return ""
    if sparsity["kind"] == "threshold":
        return f"|x| > {units.significant(sparsity['threshold'], 2)}"
    if sparsity["kind"] == "relu":
        return "x > 0"
    of = f" of {sparsity['block']}" if sparsity["block"] else ""
    by = f" by {sparsity['unit']}" if sparsity["unit"] > 1 else ""
    return f"{sparsity['keep']}{of} {'weighted ' * sparsity['weighted']}inputs{by}"


def _numbers(linear: Mapping[str, Any]) -> str:
    weights = linear.get("stored_as") or "unquantised"
    if linear["bits"] is not None:
        group = f" g{linear['group_size']}" if linear["group_size"] else " per channel"
        weights = f"W{linear['bits']}{group}{'' if linear['symmetric'] else ' asym'}"
        if (form := linear.get("format", "int")) != "int":
            weights = form.upper()
    if not linear["input_bits"]:
        return weights
    clip = linear.get("input_clip", 1.0)
    asymmetric = "" if linear.get("input_symmetric", True) else " asym"
    return f"{weights}, A{linear['input_bits']}{asymmetric}{'' if clip == 1 else f' clip {clip:.2f}'}"


def transforms(linear: Mapping[str, Any]) -> str:
    """``rotation 128 · permutation``: what runs on the input of a linear, in order; "" if nothing does."""
    names = {"block_matrix": "matrix", "kronecker": "Kronecker", "hadamard": "Hadamard"}
    parts = []
    for transform in linear.get("transform", ()):
        size = transform.get("block") or (f"{transform['left']}⊗{transform['right']}" if "left" in transform else "")
        parts.append(f"{names.get(transform['kind'], transform['kind'])} {size}".strip())
    return " · ".join(parts)


def reads(role: str) -> str:
    """``gate_up`` as people write it."""
    return {"qkv": "q/k/v", "q_up": "q up", "kv_up": "k/v up", "gate_up": "gate/up"}.get(role, role)


def by_block(linears: Iterable[Mapping[str, Any]]) -> tuple[list[str], dict[tuple[str, int], Mapping[str, Any]]]:
    """Short names in order, and the linears by (short name, block)."""
    table = {(linear["name"].rsplit(".", 1)[-1], linear["block"]): linear for linear in linears}
    return list(dict.fromkeys(name for name, _ in table)), table


def row_cells(row: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, str]:
    """The cells of one model, as text."""
    seconds = row["compress_seconds"]
    return {
        "name": row["name"],
        "description": row["description"],
        "size": units.size(row["bytes"]),
        "ratio": f"{dense['bytes'] / row['bytes']:.2f}×",
        "bits": f"{row['bits_per_weight']:.2f}",
        "sparsity": units.percent(row["sparsity"]),
        "bits_per_byte": f"{row['bits_per_byte']:.4f}",
        "perplexity": units.significant(row["perplexity"], 4),
        "speed": f"{units.significant(row['decode_tokens_per_s'], 3)}",
        "speedup": f"{row['speedup']:.2f}×",
        "seconds": "–" if seconds is None else units.duration(seconds),
    }
