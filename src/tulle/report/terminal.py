"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tulle.report import units
from tulle.report.cells import DEMO_COLUMNS, reads, row_cells, scheme

WIDE = 106
"""Characters across a terminal that holds all columns of the demo's table."""
NOT_NARROW = ("ratio", "sparsity", "perplexity")
"""Columns that follow from others, left out on a narrower one."""


def text_table(model: str, score: Mapping[str, Any]) -> Table:
    """Perplexity, bits per byte and how much was scored."""
    table = _table("model", "perplexity", "bits per byte", "tokens", "bytes")
    table.add_row(
        model,
        units.significant(score["perplexity"], 5),
        f"{score['bits_per_byte']:.4f}",
        f"{score['tokens']:,}",
        f"{score['bytes']:,}",
    )
    return table


def task_table(model: str, tasks: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracies in percent with their standard errors."""
    table = _table("task", "accuracy", "length-normalised", "rows", title=model)
    for task in tasks:
        table.add_row(
            task["task"],
            _accuracy(task["accuracy"], task["accuracy_stderr"]),
            _accuracy(task["accuracy_norm"], task["accuracy_norm_stderr"]),
            f"{task['examples']:,}",
        )
    return table


def controller_table(found: Mapping[str, Any]) -> Table:
    """What the controllers of a Scaling Transformer choose, layer by layer."""
    table = _table(
        "layer", "units", "dead", "effective of N", "changed", "certainty", title=f"{found['tokens']:,} tokens"
    )
    for number, layer in enumerate(found["layers"]):
        table.add_row(
            str(number),
            f"{layer['units']:,}",
            f"{layer['dead']:,}",
            f"{layer['effective_units']:.1f} of {found['architecture']['block']}",
            units.percent(layer["changed"]),
            units.percent(layer["certainty"]),
        )
    return table


def recovery_table(report: Mapping[str, Any]) -> Table:
    """Held-out figures over the training, and perplexities where they were measured."""
    recover, evaluation = report["recover"], report["evaluation"]
    table = _table("step", "tokens", "held-out KL", "held-out perplexity")
    for row in recover["curve"]:
        table.add_row(
            f"{row['step']:,}",
            f"{row['tokens']:,}",
            f"{row['held_out_kl']:.4f}",
            units.significant(row["held_out_perplexity"], 5),
        )
    if evaluation:
        dense, after = (units.significant(evaluation[k]["perplexity"], 5) for k in ("dense", "compressed"))
        table.caption = f"perplexity on the evaluation text: dense {dense}, recovered {after}"
    return table


def compression_table(report: Mapping[str, Any]) -> Table:
    """Before and after, one row each."""
    totals, evaluation = report["totals"], report["evaluation"]
    table = _table(
        "", "size", "linears", "bits per weight", "sparsity", "perplexity", "bits per byte", "time", "peak memory"
    )

    def quality(which: str) -> tuple[str, str]:
        if not evaluation:
            return "–", "–"
        return units.significant(evaluation[which]["perplexity"], 5), f"{evaluation[which]['bits_per_byte']:.4f}"

    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in report["linears"]) or 1
    dense_bits = f"{8 * totals['linear_dense_bytes'] / weights:.2f}"
    table.add_row(
        report["model"],
        units.size(totals["dense_bytes"]),
        units.size(totals["linear_dense_bytes"]),
        dense_bits,
        "0 %",
        *quality("dense"),
    )
    table.add_row(
        report["recipe"].get("name") or "compressed",
        units.size(totals["packed_bytes"]),
        units.size(totals["linear_packed_bytes"]),
        f"{totals['bits_per_weight']:.2f}",
        units.percent(totals["sparsity"]),
        *quality("compressed"),
        units.duration(report["seconds"]["total"]),
        units.size(report["peak_memory_bytes"]),
    )
    return table


def inspection_table(found: Mapping[str, Any]) -> Table:
    """One row per role and scheme: the linears of a model are too many for a terminal."""
    table = _table(
        "role",
        "linears",
        "scheme",
        "sparsity",
        "size",
        "bits per weight",
        "kurtosis ≤",
        "outlier ratio ≤",
        "4-bit error ≤",
    )
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for linear in found["linears"]:
        rows.setdefault((linear["role"], scheme(linear)), []).append(linear)
    for (role, how), linears in rows.items():
        weights = sum(x["shape"][0] * x["shape"][1] for x in linears)
        size = sum(x["bytes"] for x in linears)
        errors = [x["rounding_error"] for x in linears if x["rounding_error"] is not None]
        table.add_row(
            role, str(len(linears)), how,
            units.percent(sum(x["sparsity"] * x["shape"][0] * x["shape"][1] for x in linears) / weights),
            units.size(size), f"{8 * size / weights:.2f}", units.significant(max(x["kurtosis"] for x in linears), 3),
            units.significant(max(x["outlier_ratio"] for x in linears), 3), units.error(max(errors)) if errors else "–",
        )  # fmt: skip
    rest = found["totals"]["bytes"] - found["totals"]["linear_bytes"]
    table.add_row("rest", str(len(found["others"])), "–", "", units.size(rest), "", "", "", "")
    return table


def activation_lines(found: Mapping[str, Any]) -> list[str]:
    """One line per input and kind of outlier that it has."""
    inputs = found.get("activations", {}).get("inputs", ())
    lines = []
    for x in inputs:
        where = f"block {x['block']}, input of {', '.join(name.rsplit('.', 1)[-1] for name in x['readers'])}"
        if x["normal"]:
            top, count = x["normal"][0], len(x["normal"])
            lines.append(
                f"{where}: {count} channel{'s' * (count > 1)} large for most tokens, up to "
                f"{units.significant(top['ratio'], 3)} times the median channel (channel {top['channel']})"
            )
        if x["massive_values"]:
            top, count, tokens = x["massive"][0], x["massive_values"], x["massive_tokens"]
            text = repr(top["text"]) + ", " if "text" in top else ""
            lines.append(
                f"{where}: {count} massive value{'s' * (count > 1)} on {tokens} token{'s' * (tokens > 1)}, up to "
                f"{units.significant(top['ratio'], 3)} times the median (channel {top['channel']}, {text}position "
                f"{top['position']} of sequence {top['sequence']})"
            )
    return lines or (["no outliers among the activations"] if inputs else [])


def sensitivity_table(measured: Mapping[str, Any], most: int = 8) -> Table:
    """The linears whose rounding costs the model most."""
    bits = measured["bits"]
    ranks = f"{measured['spearman']:.2f} (KL), {measured['spearman_loss']:.2f} (loss)"
    title = f"W{bits}A{bits}, one at a time; Spearman {ranks}"
    table = _table("linear", "output error", "loss rise", "KL divergence", title=title)
    for x in sorted(measured["linears"], key=lambda x: -x["kl"])[:most]:
        table.add_row(x["name"], units.error(x["output_error"]), f"{x['loss_rise']:+.5f}", f"{x['kl']:.5f}")
    return table


def demo_table(found: Mapping[str, Any], width: int = WIDE) -> Table:
    """Dense and every recipe, one row each; without ``NOT_NARROW`` if narrower than ``WIDE``."""
    columns = [(heading, key) for heading, key in DEMO_COLUMNS if width >= WIDE or key not in NOT_NARROW]
    table = _table(*(heading.replace("bits/", "bits/\n") for heading, _ in columns))
    table.collapse_padding = True
    for row in found["rows"]:
        cells = row_cells(row, found["rows"][0])
        table.add_row(*(cells[key] for _, key in columns))
    return table


def _accuracy(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def law_table(found: Mapping[str, Any]) -> Table:
    """Constants of each law and its optimum with their intervals, and how held-out runs were predicted."""
    table = _table("weights", "", "value", "95 %", title="L(N, S) = E + (B + C·exp(β/(1−S)))/N^α")
    for kind, one in found["laws"].items():
        rows = [(key, f"{value:.4g}", one.get("intervals", {}).get(key)) for key, value in one["law"].items()]
        for number, (key, value, ends) in enumerate(rows):
            span = "–" if ends is None else f"{ends[0]:.4g} – {ends[1]:.4g}"
            table.add_row((kind or "–") if number == 0 else "", key, value, span)
        span = _percents(one["optimum_interval"]) if "optimum_interval" in one else "–"
        table.add_row("", "best sparsity", units.percent(one["optimum"]), span)
        for run in one["held_out"]:
            span = " – ".join(f"{end:.4f}" for end in run["interval"]) if "interval" in run else "–"
            what = f"held out: {run['size']:,.0f}, {units.percent(run['sparsity'])}, loss {run['loss']:.4f}"
            table.add_row("", what, f"{run['predicted']:.4f}", span)
    return table


def optimum_table(found: Mapping[str, Any]) -> Table:
    """The best sparsity of each law and, at a budget, the model that has it."""
    budget = found["budget"]
    table = _table("weights", "best sparsity", "95 %", "parameters", "loss", "95 %", "dense of that budget")
    for kind, one in found["optima"].items():
        span = _percents(one["interval"]) if "interval" in one else "–"
        if "stated" in one:
            span = f"the paper states {units.percent(one['stated'])}"
        model = ["–"] * 4
        if budget is not None:
            ends = "–".join(f"{end:.4f}" for end in one["loss_interval"]) if "loss_interval" in one else "–"
            model = [f"{one['size']:,.0f}", f"{one['loss']:.4f}", ends, f"{one['dense_loss']:.4f}"]
        table.add_row(kind or "–", units.percent(one["sparsity"]), span, *model)
    return table


def _percents(ends: Sequence[float]) -> str:
    return " – ".join(units.percent(end) for end in ends)


def activity_table(activity: Mapping[str, Any]) -> Table:
    """What a token reads, by role, on average over the blocks."""
    found, rows = activity["total"], activity["rows"]
    title = (
        f"{activity['active_parameters']:,.0f} of {activity['parameters']:,} parameters read per token, "
        f"{activity['tokens']:,} tokens"
    )
    table = _table("inputs of", "zero", "weights not read", "shared with the token before", "by chance", title=title)
    for role in dict.fromkeys(row["role"] for row in rows):
        own = [row for row in rows if row["role"] == role]
        unread = 1 - sum(row["active"] for row in own) / max(sum(row["weights"] for row in own), 1)
        zero, overlap, chance = (sum(r[key] for r in own) / len(own) for key in ("sparsity", "overlap", "chance"))
        table.add_row(reads(role), *map(units.percent, (zero, unread, overlap, chance)))
    table.add_row("all", "", units.percent(found["sparsity"]), "", "")
    return table
