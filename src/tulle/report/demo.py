"""The page of ``tulle demo``: dense and every shipped recipe side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulle.report import plots, units
from tulle.report.cells import row_cells
from tulle.report.inspection import describe
from tulle.report.page import chart, render, tile, write_page


def write_demo(found: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for the result of :func:`tulle.demo.run_demo`."""
    write_page(Path(file), demo_page(found))


def demo_page(found: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file (each recipe's row links to its own report beside it)."""
    rows = found["rows"]
    dense = rows[0]
    smallest = min(rows, key=lambda row: row["bytes"])
    nearest = min(rows[1:], key=lambda row: row["bits_per_byte"], default=dense)
    calibration, machine = found["calibration"], found["machine"]
    return render(
        "demo.html",
        title="Sparse and low-bit: the bundled model by every shipped recipe",
        subtitle=describe(found["architecture"]),
        tiles=[
            tile("Dense", units.size(dense["bytes"]), f"{dense['bits_per_byte']:.3f} bits per byte"),
            tile("Smallest", units.size(smallest["bytes"]), f"{smallest['name']}: {smallest['bits_per_byte']:.3f} bits per byte"),
            tile("Nearest to dense", f"{nearest['bits_per_byte'] - dense['bits_per_byte']:+.4f}", f"bits per byte, by {nearest['name']}"),
            tile("Time", units.duration(found["seconds"]), "compressing and evaluating everything"),
        ],
        charts=[
            chart(
                "Size against quality",
                "Whole model, embeddings included; dashed: the dense model.",
                plots.size_against_quality([(r["name"], r["bytes"] / 1e6, r["bits_per_byte"]) for r in rows], dense["name"]),
                wide=True,
            ),
            chart(
                "Bits per weight", "Of the linears, all counted.",
                plots.horizontal("bits", [(r["name"], r["bits_per_weight"]) for r in rows], "bits per weight"),
            ),
            chart(
                "What compression costs", "Bits per byte above the dense model.",
                plots.horizontal("cost", [(r["name"], max(0.0, r["bits_per_byte"] - dense["bits_per_byte"])) for r in rows[1:]], "bits per byte"),
            ),
        ],
        rows=[row_cells(row, dense) for row in rows],
        prompt=found["prompt"],
        samples=[(r["name"], r["sample"]) for r in rows],
        facts=[
            ("Calibration", f"{', '.join(calibration['source'])}: {calibration['samples']} sequences, {calibration['tokens']:,} tokens"),
            ("Evaluation", f"{found['protocol']}; {dense['tokens']:,} tokens, {dense['scored_bytes']:,} bytes scored"),
            ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; Python {machine['python']}, torch {machine['torch']}"),
        ],
    )  # fmt: skip
