"""The loss curve of a run, as rows and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a kill has cut is none."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def draw_curve(rows: list[dict[str, Any]], path: Path, boundaries: Sequence[int] = ()) -> None:
    """Draw training loss and held-out bits per byte over tokens; the suffix of ``path`` sets the format.

    ``boundaries``: tokens at which stages meet.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trained = [row for row in rows if "loss" in row]
    tokens = [row["tokens"] / 1e6 for row in trained]
    (loss,) = axes.plot(tokens, [row["loss"] for row in trained], color="tab:blue", label="training loss")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("training loss (nats per token)")
    other = axes.twinx()
    (bits,) = other.plot(
        [row["tokens"] / 1e6 for row in rows],
        [row["held_out_bits_per_byte"] for row in rows],
        color="tab:orange",
        label="held-out bits per byte",
    )
    other.set_ylabel("held-out bits per byte")
    for boundary in boundaries:
        axes.axvline(boundary / 1e6, color="0.6", linewidth=0.8, linestyle=":")
    axes.legend(handles=[loss, bits])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
