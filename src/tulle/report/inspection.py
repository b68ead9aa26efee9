"""The page of ``tulle inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulle.report import plots, units
from tulle.report.cells import by_block, scheme
from tulle.report.page import chart, render, tile, write_page

COLUMNS = (
    "linear", "role", "shape", "scheme", "sparsity", "size", "bits/weight", "std", "max |w|", "kurtosis",
    "outlier ratio", "outlier channels", "4-bit error",
)  # fmt: skip


def write_inspection(found: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for the result of :func:`tulle.inspection.inspect_model`."""
    write_page(Path(file), inspection_page(found))


def inspection_page(found: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file."""
    architecture, totals = found["architecture"], found["totals"]
    return render(
        "inspection.html",
        title=found["model"],
        subtitle=describe(architecture),
        tiles=[
            tile("Size", units.size(totals["bytes"]), f"linears {units.size(totals['linear_bytes'])}"),
            tile("Bits per weight", f"{totals['bits_per_weight']:.2f}", "of the linears, all counted"),
            tile("Sparsity", units.percent(totals["sparsity"]), "of the linears"),
            tile("Weights in linears", f"{totals['linear_weights']:,}", f"{len(found['linears'])} linears"),
        ],
        charts=_charts(found),
        table_columns=COLUMNS,
        table_rows=[_row(x) for x in found["linears"]],
        other_rows=[
            (x["name"], "×".join(map(str, x["shape"])), x["dtype"], units.size(x["bytes"])) for x in found["others"]
        ],
    )


def describe(architecture: Mapping[str, Any]) -> str:
    """``llama, 22 blocks, d 2048, ffn 5632, 32/4 heads of 64, vocabulary 32,000``."""
    a = architecture
    return (
        f"{a['type']}, {a['blocks']} blocks, d {a['hidden']}, ffn {a['intermediate']}, "
        f"{a['heads']}/{a['kv_heads']} heads"
        f" of {a['head_dim']}, vocabulary {a['vocabulary']:,}{', tied embeddings' if a['tied'] else ''}"
    )


def _charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    linears = found["linears"]
    names, table = by_block(linears)
    blocks = found["architecture"]["blocks"]

    def column(key: str) -> list[list[float | None]]:
        return [[None if (x := table.get((name, b))) is None else x[key] for b in range(blocks)] for name in names]

    charts = [
        chart(
            "Where the bytes are",
            "By role; the rest is embeddings, norms and biases.",
            plots.horizontal("bytes", _sizes(found), "MB"),
        )
    ]
    charts.append(
        chart(
            "Bits per weight",
            "Stored bytes × 8 / weights.",
            plots.matrix("bits", names, column("bits_per_weight"), lambda v: f"{v:.2f}"),
        )
    )
    if any(x["sparsity"] > 0.01 for x in linears):
        charts.append(
            chart(
                "Sparsity",
                "Share of weights that are exactly zero.",
                plots.matrix("sparsity", names, column("sparsity"), units.percent),
            )
        )
    if all(x["rounding_error"] is not None for x in linears):
        charts.append(
            chart(
                "Sensitivity",
                "‖W − Ŵ‖² / ‖W‖² when rounded to nearest in 4 bits (groups of 128 where they fit), in thousandths.",
                plots.matrix("sensitivity", names, _scaled(column("rounding_error"), 1000), lambda v: f"{v:.1f}"),
            )
        )
    charts += [
        chart(
            "Kurtosis",
            "Of the non-zero weights; 3 for a Gaussian. Heavy tails waste the levels of a uniform grid.",
            plots.matrix("kurtosis", names, column("kurtosis"), lambda v: units.significant(v, 2)),
        ),
        chart(
            "Outlier ratio",
            "Largest |w| of the most extreme input channel over the median channel's.",
            plots.matrix("outliers", names, column("outlier_ratio"), lambda v: units.significant(v, 2)),
        ),
        chart(
            "The most extreme linear",
            f"max |w| of each input channel of {found['extreme']['name']}.",
            plots.channels(found["extreme"]["channel_absmax"]),
        ),
    ]
    return charts


def _scaled(values: list[list[float | None]], factor: float) -> list[list[float | None]]:
    return [[None if v is None else v * factor for v in row] for row in values]


def _sizes(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    sizes: dict[str, float] = {}
    for linear in found["linears"]:
        sizes[linear["role"]] = sizes.get(linear["role"], 0) + linear["bytes"] / 1e6
    sizes["rest"] = (found["totals"]["bytes"] - found["totals"]["linear_bytes"]) / 1e6
    return list(sizes.items())


def _row(x: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        x["name"], x["role"], "×".join(map(str, x["shape"])), scheme(x),
        units.percent(x["sparsity"]) + (f" ({x['pattern']})" if x["pattern"] else ""), units.size(x["bytes"]),
        f"{x['bits_per_weight']:.2f}", units.significant(x["std"], 3), units.significant(x["absmax"], 3),
        units.significant(x["kurtosis"], 3), units.significant(x["outlier_ratio"], 3), str(x["outlier_channels"]),
        "–" if x["rounding_error"] is None else units.error(x["rounding_error"]),
    )  # fmt: skip
