"""``report.html`` of one compression, from the object in ``report.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tulle.report import plots, units
from tulle.report.activity import activity_charts, activity_tile
from tulle.report.cells import by_block, scheme, transforms
from tulle.report.page import chart, render, tile, write_page
from tulle.report.sparsity import sparsity_charts

COLUMNS = (
    "linear", "role", "shape", "scheme", "sparsity", "dense", "packed", "bits/weight", "output error", "time",
)  # fmt: skip
TRANSFORMED = "transforms of the input"


def write_report(report: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for ``report`` (the content of ``report.json``)."""
    write_page(Path(file), compression_page(report))


def compression_page(report: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file."""
    recipe = report["recipe"]
    transformed = any(linear.get("transform") for linear in report["linears"])
    return render(
        "compression.html",
        title=f"{report['model']} → {recipe.get('name') or 'compressed'}",
        subtitle=recipe.get("description", ""),
        tiles=_tiles(report),
        charts=_charts(report),
        recipe_note="Every setting, defaults included.",
        recipe_text=yaml.safe_dump(
            {k: v for k, v in recipe.items() if k not in ("name", "description")},
            sort_keys=False,
            default_flow_style=None,
        ),
        facts=_facts(report),
        notes=notes(report),
        table_columns=(*COLUMNS, TRANSFORMED) if transformed else COLUMNS,
        table_rows=[
            _table_row(linear) + ((transforms(linear) or "–",) if transformed else ()) for linear in report["linears"]
        ],
    )


def notes(report: Mapping[str, Any]) -> list[str]:
    """Notes of all linears, equal ones once with the linears they concern."""
    found: dict[str, list[str]] = {}
    for linear in report["linears"]:
        for note in linear["notes"]:
            found.setdefault(note, []).append(linear["name"])
    lines = []
    for note, names in found.items():
        where = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"{where}: {note}")
    for block in report["blocks"]:
        lines += [f"block {block['index']}: {note}" for note in block.get("notes", ())]
    return [*report.get("notes", ()), *lines]


def attention(report: Mapping[str, Any]) -> str:
    """``keys 4 bits, values 4 bits``, or "" where they are left alone."""
    found = report.get("attention") or {}
    parts = [
        f"{plural} {found[name]['bits']} bits{'' if found[name]['symmetric'] else ' asymmetric'}"
        for name, plural in (("query", "queries"), ("key", "keys"), ("value", "values"))
        if found.get(name)
    ]
    if found.get("hadamard"):
        parts.append("queries and keys through a Hadamard transform")
    return ", ".join(parts)


def read_again(found: Mapping[str, Any]) -> str:
    """What came of reading the written model again (``reload`` of the report)."""
    before, after = (units.significant(math.exp(min(found[key], 700.0)), 4) for key in ("predicted_loss", "loss"))
    return (
        f"perplexity {after} on {found['tokens']:,} calibration tokens, where {before} was predicted; tokens "
        f"{found['difference']:.2g} nats apart on average, {found['allowed']:.2g} allowed"
    )


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    totals, evaluation = report["totals"], report["evaluation"]
    ratio = totals["dense_bytes"] / max(1, totals["packed_bytes"])
    linears = totals["linear_dense_bytes"] / max(1, totals["linear_packed_bytes"])
    tiles = [
        tile(
            "Size",
            f"{units.size(totals['dense_bytes'])} → {units.size(totals['packed_bytes'])}",
            f"{ratio:.2f}× smaller; linears {linears:.2f}×",
        ),
        tile("Bits per weight", f"{totals['bits_per_weight']:.2f}", "of the linears, all counted"),
        tile("Sparsity", units.percent(totals["sparsity"]), "of the linears"),
    ]
    if rows := _activity(report):
        tiles.append(activity_tile(rows))
    if evaluation:
        before, after = evaluation["dense"], evaluation["compressed"]
        tiles.append(
            tile(
                "Perplexity",
                f"{units.significant(before['perplexity'], 4)} → {units.significant(after['perplexity'], 4)}",
                f"bits per byte {before['bits_per_byte']:.3f} → {after['bits_per_byte']:.3f}",
            )
        )
    tiles.append(
        tile(
            "Time", units.duration(report["seconds"]["total"]), f"peak memory {units.size(report['peak_memory_bytes'])}"
        )
    )
    return tiles


def _charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    totals, linears = report["totals"], report["linears"]
    names, table = by_block(linears)
    blocks = len(report["blocks"])
    roles = list(dict.fromkeys(linear["role"] for linear in linears))
    packed = {
        role: [
            sum(x["packed_bytes"] for x in linears if x["role"] == role and x["block"] == b) / 1e6
            for b in range(blocks)
        ]
        for role in roles
    }
    dense = [sum(x["dense_bytes"] for x in linears if x["block"] == b) / 1e6 for b in range(blocks)]

    def column(key: str) -> list[list[float | None]]:
        return [[None if (x := table.get((name, b))) is None else x[key] for b in range(blocks)] for name in names]

    sizes = [
        (label, totals[f"linear_{key}_bytes"], totals[f"{key}_bytes"] - totals[f"linear_{key}_bytes"])
        for label, key in (("before", "dense"), ("after", "packed"))
    ]
    errors = {name: (_role(linears, name), row) for name, row in zip(names, column("output_error"), strict=True)}
    # Of a recipe that has changed tables alone there is nothing to draw by linears.
    by_linear = [
        chart(
            "Output error per linear",
            "‖ŷ − y‖² / ‖y‖² over the calibration tokens: what the linear gives in the compressed model against the "
            "dense model, so errors of the blocks before it are included.",
            plots.error_per_linear(errors),
        ),
        chart("Size per block", "Linears only, dense and packed.", plots.size_per_block(dense, packed)),
        chart(
            "Bits per weight",
            "Packed bytes × 8 / weights: codes, scales, zero points and bitmask. Transforms of inputs are not in it.",
            plots.matrix("bits", names, column("bits_per_weight"), lambda v: f"{v:.2f}"),
        ),
    ] if linears else []  # fmt: skip
    charts = [
        *by_linear[:1],
        chart(
            "Size",
            "All tensors of the files. The rest is embedding, head, norms and biases.",
            plots.totals(sizes),
        ),
        *by_linear[1:2],
        chart(
            "Error growth through the blocks",
            "The same measure for the residual stream after each block.",
            plots.block_error([block["output_error"] for block in report["blocks"]]),
        ),
        *by_linear[2:],
    ]
    charts.append(chart("Time per stage", _time_note(report), plots.durations(stage_seconds(report))))
    return charts + activity_charts(_activity(report), report["calibration"]["tokens"]) + sparsity_charts(report)


def _activity(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the tokens read of each role of each block; nothing in a model that reads all of its inputs."""
    return [row | {"block": block["index"]} for block in report["blocks"] for row in block.get("activity", ())]


def stage_seconds(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage, the recipe's steps by name."""
    stages = {k: v for k, v in report["seconds"].items() if k not in ("total", "steps")}
    return stages | report["seconds"]["steps"]


def _time_note(report: Mapping[str, Any]) -> str:
    tokens = report["calibration"]["tokens"]
    return f"{units.duration(report['seconds']['total'])} in all, for {tokens:,} calibration tokens."


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration, machine, evaluation = report["calibration"], report["machine"], report["evaluation"]
    amount = f"{calibration['samples']} sequences of up to {calibration['length']} tokens"
    facts = [
        ("Calibration", f"{', '.join(calibration['source'])}: {amount}, {calibration['tokens']:,} in all"),
        ("Seed", str(report["seed"])),
    ]
    for table in report.get("tables", ()):
        sizes = f"{units.size(table['dense_bytes'])} → {units.size(table['packed_bytes'])}"
        facts.append((table["role"].capitalize(), f"{scheme({'input_bits': None} | table)}, {sizes}"))
    if attention(report):
        facts.append(("Attention", f"{attention(report)}; per token and head"))
    if evaluation:
        facts.append(("Perplexity", f"{evaluation['protocol']}; {evaluation['compressed']['tokens']:,} tokens scored"))
    if found := report.get("reload"):
        facts.append(("Read again", read_again(found)))
    facts += [
        ("Parameters", f"{report['totals']['parameters']:,}"),
        ("Peak memory", units.size(report["peak_memory_bytes"])),
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"),
        ("Software", f"Tulle {report['tulle']}, Python {machine['python']}, torch {machine['torch']}"),
    ]
    return facts


def _table_row(linear: Mapping[str, Any]) -> tuple[str, ...]:
    pattern = f" ({linear['pattern']})" if linear["pattern"] else ""
    return (
        linear["name"],
        linear["role"],
        "×".join(map(str, linear["shape"])),
        scheme(linear),
        units.percent(linear["sparsity"]) + pattern,
        units.size(linear["dense_bytes"]),
        units.size(linear["packed_bytes"]),
        f"{linear['bits_per_weight']:.2f}",
        units.error(linear["output_error"]),
        units.duration(linear["seconds"]),
    )


def _role(linears: Iterable[Mapping[str, Any]], short: str) -> str:
    return next(x["role"] for x in linears if x["name"].endswith("." + short))
