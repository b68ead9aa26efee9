"""The page of ``tulle inspect``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tulle.report import landscapes, plots, units
from tulle.report.activity import activity_charts
from tulle.report.cells import by_block, reads, scheme
from tulle.report.page import chart, render, table, tile, write_page

COLUMNS = (
    "linear", "role", "shape", "scheme", "sparsity", "size", "bits/weight", "std", "max |w|", "kurtosis",
    "outlier ratio", "outlier channels", "4-bit error",
)  # fmt: skip


def write_inspection(found: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for the result of :func:`tulle.inspect.weights.inspect_model`."""
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
        charts=_charts(found) + _activity_charts(found) + _activation_charts(found) + _sensitivity_charts(found),
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
    names, _ = by_block(linears)

    def column(key: str) -> list[list[float | None]]:
        return _columns(linears, found, key)[1]

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
                "Rounding of weights",
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


def _activity_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    activity = found.get("activity")
    return [] if activity is None else activity_charts(activity["rows"], activity["tokens"])


def _activation_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    activations = found.get("activations")
    if not activations:
        return []
    inputs = activations["inputs"]
    roles = list(dict.fromkeys(x["role"] for x in inputs))
    blocks = found["architecture"]["blocks"]
    by_role = {(x["role"], x["block"]): x for x in inputs}

    def matrix(key: str, write: Callable[[float], str]) -> str:
        values = [[by_role[role, b][key] for b in range(blocks)] for role in roles]
        return plots.matrix(f"activation-{key}", [reads(role) for role in roles], values, write)

    charts = [
        chart(
            "Outliers of activations",
            f"Inputs of linears, {activations['tokens']:,} tokens. Normal: a channel whose median |x| is 8 times the "
            "median channel's, and more than that ever reaches. Massive: a value 100 times the median |x|, 5 times "
            "what the median token reaches and 20 times the median of its channel.",
            found_outliers(inputs),
            wide=True,
        ),
        chart(
            "Largest channel",
            "Max |x| of the largest channel over that of the median channel.",
            matrix("channel_ratio", lambda v: units.significant(v, 3)),
        ),
        chart(
            "Largest channel for most tokens",
            "Median |x| of the largest channel over that of the median channel.",
            matrix("normal_ratio", lambda v: units.significant(v, 3)),
        ),
        chart(
            "Largest value",
            "Over the median |x|, leaving out what a normal outlier channel always is.",
            matrix("massive_ratio", lambda v: units.significant(v, 3)),
        ),
        chart(
            "Rounding of activations",
            "‖x̂ − x‖² / ‖x‖² in 4 bits per token, asymmetric, as the inputs are.",
            matrix("rounding_error", units.percent),
        ),
    ]
    for shown in activations["landscapes"]:
        where = f"input of {reads(shown['role'])}, block {shown['block']}"
        kinds = " and ".join(shown["kinds"])
        name = f"{shown['role']}-{shown['block']}"
        charts.append(
            chart(
                f"{kinds.capitalize()} outliers: {where}" if kinds else f"No outliers: the most uneven {where}",
                "Maximum |x| of each channel (bars) and median (line). Below, |x| of the same tokens before and after "
                "each transform, every surface on a height scale of its own; over it the maximum of all tokens, the "
                "error ‖x̂ − x‖² / ‖x‖² of rounding to 4 bits (A4) and that of the output with 4-bit weights (W4A4).",
                landscapes.channel_profile(f"profile-{name}", shown["channel_absmax"], shown["channel_median"])
                + landscapes.surfaces(f"landscape-{name}", shown["stages"]),
                wide=True,
            )
        )
    return charts


def found_outliers(inputs: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """A table with one row per input and kind of outlier, with the ``most`` largest ones."""
    rows = []
    for x in inputs:
        readers = ", ".join(name.rsplit(".", 1)[-1].removesuffix("_proj") for name in x["readers"])
        where = (f"block {x['block']}", readers)
        error = units.percent(x["rounding_error"])
        if x["normal"]:
            top = ", ".join(f"{c['channel']} (×{units.significant(c['ratio'], 3)})" for c in x["normal"][:most])
            more = " …" if len(x["normal"]) > most else ""
            rows.append(
                (*where, "normal", f"{top}{more}", "most",
                 units.significant(max(c["absmax"] for c in x["normal"]), 3),
                 units.significant(x["normal_ratio"], 3), error)
            )  # fmt: skip
        if x["massive_values"]:
            listed = list(dict.fromkeys(v["channel"] for v in x["massive"]))
            top = ", ".join(map(str, listed[:most])) + (" …" if x["massive_channels"] > most else "")
            rows.append(
                (*where, "massive", top, f"{x['massive_tokens']}: {_tokens(x['massive'], most)}",
                 units.significant(abs(x["massive"][0]["value"]), 3), units.significant(x["massive_ratio"], 3), error)
            )  # fmt: skip
    if not rows:
        return "<p>None.</p>"
    return table(("", "read by", "kind", "channels", "tokens", "max |x|", "× median", "4-bit error"), rows, 5)


def _tokens(massive: Sequence[Mapping[str, Any]], most: int) -> str:
    """The tokens that carry the largest values, once each: ``'def' at 2:17`` (sequence:position)."""
    seen = {(v["sequence"], v["position"]): v.get("text", str(v["id"])) for v in massive}
    return ", ".join(f"{text!r} at {s}:{p}" for (s, p), text in list(seen.items())[:most])


def _sensitivity_charts(found: Mapping[str, Any], most: int = 10) -> list[dict[str, Any]]:
    charts = []
    for measured in found.get("sensitivity", ()):
        bits = measured["bits"]
        names, rise = _columns(measured["linears"], found, "loss_rise")
        _, local = _columns(measured["linears"], found, "output_error")
        top = sorted(measured["linears"], key=lambda x: -x["kl"])[:most]
        columns = ("linear", "error at its output", "rise of the loss, mnat", "KL at the logits, mnat")
        rows = [
            (
                x["name"],
                units.percent(x["output_error"]) if bits <= 4 else units.error(x["output_error"]),
                f"{1000 * x['loss_rise']:+.2f}",
                units.significant(1000 * x["kl"], 3),
            )
            for x in top
        ]
        points = [
            (f"{x['name'].rsplit('.', 1)[-1]} {x['block']}", x["role"], x["output_error"], x["kl"])
            for x in measured["linears"]
        ]
        charts += [
            chart(
                f"The most sensitive linears, W{bits}A{bits}",
                f"One linear at a time is rounded to {bits} bits, weights and input; thousandths of a nat per token. "
                f"Dense loss {measured['loss']:.4f} over {measured['tokens']:,} tokens.",
                table(columns, rows),
                wide=True,
            ),
            chart(
                f"Rise of the loss, W{bits}A{bits}",
                "Thousandths of a nat per token.",
                plots.matrix(f"rise-{bits}", names, _scaled(rise, 1000), lambda v: units.significant(v, 2)),
            ),
            chart(
                f"Error at the linear's output, W{bits}A{bits}",
                "‖ŷ − y‖² / ‖y‖², in thousandths.",
                plots.matrix(f"local-{bits}", names, _scaled(local, 1000), lambda v: units.significant(v, 2)),
            ),
            chart(
                f"Does the error at the linear tell? W{bits}A{bits}",
                f"Spearman correlation {measured['spearman']:.2f} with the divergence at the logits, "
                f"{measured['spearman_loss']:.2f} with the rise of the loss. One point per linear.",
                plots.sensitivity(f"spearman-{bits}", points),
            ),
        ]
    return charts


def _columns(
    linears: Sequence[Mapping[str, Any]], found: Mapping[str, Any], key: str
) -> tuple[list[str], list[list[float | None]]]:
    """Short names, and for each the values of ``key`` by block."""
    names, by_name = by_block(linears)
    blocks = range(found["architecture"]["blocks"])
    return names, [[None if (x := by_name.get((name, b))) is None else x[key] for b in blocks] for name in names]


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
