"""The page of ``tulle inspect``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tulle.report import landscapes, plots, units
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
        charts=_activation_charts(found) + _sensitivity_charts(found) + _charts(found),
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


def _activation_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    activations = found.get("activations")
    if not activations:
        return []
    inputs = activations["inputs"]
    roles = list(dict.fromkeys(x["role"] for x in inputs))
    blocks = found["architecture"]["blocks"]
    table = {(x["role"], x["block"]): x for x in inputs}

    def matrix(name: str, value: Callable[[Mapping[str, Any]], float], write: Callable[[float], str]) -> str:
        return plots.matrix(name, roles, [[value(table[role, b]) for b in range(blocks)] for role in roles], write)

    charts = [
        chart(
            "Outliers of activations",
            "Largest channel's max |x| over the median channel's, per input; over "
            f"{activations['tokens']:,} tokens. qkv and gate/up read the residual stream through a norm.",
            matrix("activation-ratio", lambda x: x["channel_ratio"], lambda v: units.significant(v, 3)),
        ),
        chart(
            "Rounding of activations",
            "‖x̂ − x‖² / ‖x‖² in 4 bits per token, asymmetric, as the inputs are.",
            matrix("activation-error", lambda x: x["rounding_error"], units.percent),
        ),
        chart("What was found", "", found_outliers(inputs), wide=True),
    ]
    for shown in activations["landscapes"]:
        what = (
            "a channel that is large for most tokens" if shown["kind"] == "normal" else "values that few tokens carry"
        )
        charts.append(
            chart(
                f"The most extreme {shown['kind']} outliers: input of {shown['role'].replace('_', '/')}, "
                f"block {shown['block']}",
                f"|x| over tokens and channels ({what}), each surface on a scale of its own. Under it what 4-bit "
                "weights and activations would lose at the output.",
                landscapes.surfaces(f"landscape-{shown['kind']}", shown["stages"]),
                wide=True,
            )
        )
    return charts


def found_outliers(inputs: Sequence[Mapping[str, Any]]) -> str:
    """The outliers of every input that has some, as text in an HTML list."""
    lines = []
    for x in inputs:
        where = f"block {x['block']}, input of {x['role'].replace('_', '/')}"
        if x["normal"]:
            names = ", ".join(map(str, x["normal"][:12])) + (" …" if len(x["normal"]) > 12 else "")
            lines.append(f"{where}: {len(x['normal'])} normal outlier channels ({names})")
        if x["massive_values"]:
            top = x["massive"][0]
            lines.append(
                f"{where}: {x['massive_values']} massive values on {x['massive_tokens']} tokens; the largest, "
                f"{units.significant(top['value'], 3)} at token {top['token']}, channel {top['channel']}, is "
                f"{units.significant(top['ratio'], 3)} times the median"
            )
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines or ["None."]) + "</ul>"


def _sensitivity_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    charts = []
    for measured in found.get("sensitivity", ()):
        names, table = by_block(measured["linears"])
        bits = measured["bits"]
        rise, local = (
            [[table[name, b][key] for b in range(found["architecture"]["blocks"])] for name in names]
            for key in ("loss_rise", "output_error")
        )

        charts += [
            chart(
                f"Sensitivity at the output, W{bits}A{bits}",
                f"Rise of the loss in thousandths of a nat per token when one linear alone is rounded to {bits} bits, "
                f"weights and input; loss {measured['loss']:.4f} over {measured['tokens']:,} tokens.",
                plots.matrix(f"rise-{bits}", names, _scaled(rise, 1000), lambda v: f"{v:.1f}"),
            ),
            chart(
                f"Sensitivity at the linear, W{bits}A{bits}",
                "‖ŷ − y‖² / ‖y‖² of its own output. Spearman correlation with the KL divergence at the logits: "
                f"{measured['spearman']:.2f}.",
                plots.matrix(f"local-{bits}", names, local, units.percent),
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
