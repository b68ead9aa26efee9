"""The page of ``tulle demo``: dense and recipes of every kind side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tulle.report import plots, units
from tulle.report.cells import row_cells
from tulle.report.inspection import describe
from tulle.report.page import chart, render, tile, write_page


def write_demo(found: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for the result of :func:`tulle.compression.demo.run_demo`."""
    write_page(Path(file), demo_page(found))


def demo_page(found: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file (each recipe's row links to its own report beside it)."""
    rows = found["rows"]
    return render(
        "demo.html",
        title="Sparse and low-bit: the bundled model by shipped recipes",
        subtitle=describe(found["architecture"]),
        tiles=_tiles(found),
        charts=_charts(rows),
        rows=[row_cells(row, rows[0]) for row in rows],
        prompt=found["prompt"],
        samples=[(row["name"], row["sample"]) for row in rows],
        facts=_facts(found),
    )


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    dense, *compressed = found["rows"]
    smallest = min(compressed, key=lambda row: row["bytes"])
    nearest = min(compressed, key=lambda row: row["bits_per_byte"])
    cost = nearest["bits_per_byte"] - dense["bits_per_byte"]
    return [
        tile("Dense", units.size(dense["bytes"]), f"{dense['bits_per_byte']:.3f} bits per byte"),
        tile(
            "Smallest",
            units.size(smallest["bytes"]),
            f"{smallest['name']}: {smallest['bits_per_byte']:.3f} bits per byte",
        ),
        tile("Nearest to dense", f"{round(cost, 4) + 0.0:+.4f}", f"bits per byte, by {nearest['name']}"),
        tile("Time", units.duration(found["seconds"]), "compressing and evaluating everything"),
    ]


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    dense, *compressed = rows
    points = [(row["name"], row["bytes"] / 1e6, row["bits_per_byte"]) for row in rows]
    bits = [(row["name"], row["bits_per_weight"]) for row in rows]
    # A compressed model may come out better than the dense one by chance: nothing to draw then.
    cost = [(row["name"], max(0.0, row["bits_per_byte"] - dense["bits_per_byte"])) for row in compressed]
    return [
        chart(
            "Size against quality",
            "Whole model, embeddings included; dashed: the dense model.",
            plots.size_against_quality(points, dense["name"]),
            wide=True,
        ),
        chart("Bits per weight", "Of the linears, all counted.", plots.horizontal("bits", bits, "bits per weight")),
        chart(
            "What compression costs",
            "Bits per byte above the dense model.",
            plots.horizontal("cost", cost, "bits per byte"),
        ),
    ]


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration, machine, dense = found["calibration"], found["machine"], found["rows"][0]
    amount = f"{calibration['samples']} sequences, {calibration['tokens']:,} tokens"
    return [
        ("Calibration", f"{', '.join(calibration['source'])}: {amount}"),
        ("Evaluation", f"{found['protocol']}; {dense['tokens']:,} tokens, {dense['scored_bytes']:,} bytes scored"),
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"),
        ("Software", f"Python {machine['python']}, torch {machine['torch']}"),
    ]
