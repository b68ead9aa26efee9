"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tulle.report import units


def text_table(model: str, score: Mapping[str, Any]) -> Table:
    """Perplexity, bits per byte and how much was scored."""
    table = _table("model", "perplexity", "bits per byte", "tokens", "bytes")
    table.add_row(
        model, units.significant(score["perplexity"], 5), f"{score['bits_per_byte']:.4f}", f"{score['tokens']:,}", f"{score['bytes']:,}"
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


def compression_table(report: Mapping[str, Any]) -> Table:
    """Before and after, one row each."""
    totals, evaluation = report["totals"], report["evaluation"]
    table = _table("", "size", "linears", "bits per weight", "sparsity", "perplexity", "bits per byte", "time", "peak memory")

    def quality(which: str) -> tuple[str, str]:
        if not evaluation:
            return "–", "–"
        return units.significant(evaluation[which]["perplexity"], 5), f"{evaluation[which]['bits_per_byte']:.4f}"

    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in report["linears"]) or 1
    dense_bits = f"{8 * totals['linear_dense_bytes'] / weights:.2f}"
    table.add_row(
        report["model"], units.size(totals["dense_bytes"]), units.size(totals["linear_dense_bytes"]), dense_bits, "0 %", *quality("dense")
    )
    table.add_row(
        report["recipe"].get("name") or "compressed", units.size(totals["packed_bytes"]), units.size(totals["linear_packed_bytes"]),
        f"{totals['bits_per_weight']:.2f}", units.percent(totals["sparsity"]), *quality("compressed"),
        units.duration(report["seconds"]["total"]), units.size(report["peak_memory_bytes"]),
    )  # fmt: skip
    return table


def _accuracy(value: float | None, error: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} % ± {100 * (error or 0):.1f}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table
