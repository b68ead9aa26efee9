"""Draws the runs of speed.py: tokens per second of ours and the peers', and what memory alone would allow.

    python benchmarks/plot_speed.py [--out docs/pictures/speed.png]

Reads benchmarks/results/decode.json and prefill.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS, PEER, BOUND = "#2563eb", "#9ca3af", "#111827"


def draw(axes: Any, run: dict[str, Any], title: str, bound: bool) -> None:
    """A bar per model, fastest first, and where reading its bytes alone would end."""
    rows = sorted(run["results"].items(), key=lambda row: row[1]["tokens_per_s"])
    places = range(len(rows))
    rates = [found["tokens_per_s"] for _, found in rows]
    axes.barh(places, rates, color=[OURS if name.startswith("tulle") else PEER for name, _ in rows], height=0.72)
    for place, rate in zip(places, rates, strict=True):
        axes.text(rate, place, f" {rate:.0f}" if rate >= 10 else f" {rate:.1f}", va="center", fontsize=8,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip
    if bound:
        limits = [1e9 * run["read_gb_s"] / found["bytes"] for _, found in rows]
        axes.plot(limits, places, "|", color=BOUND, markersize=9, markeredgewidth=1.5, zorder=5)
        axes.plot([], [], "|", color=BOUND, markersize=9, label=f"its bytes at {run['read_gb_s']:.0f} GB/s")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.set_yticks(places, [name for name, _ in rows], fontsize=8)
    axes.set_xlabel("tokens per second")
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.12 * max([*rates, *(limits if bound else [])]))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs/pictures/speed.png")
    arguments = parser.parse_args()
    from matplotlib.figure import Figure

    runs = {what: json.loads((HERE / f"results/{what}.json").read_text()) for what in ("decode", "prefill")}
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    sizes = [len(run["results"]) for run in runs.values()]
    upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": sizes})
    machine = runs["decode"]["machine"]
    draw(upper, runs["decode"], f"Decoding, 1.1 B parameters, {machine['threads']} threads ({machine['cpu']})", True)
    draw(lower, runs["prefill"], "A prompt of 512 tokens", False)
    figure.savefig(arguments.out, dpi=150)
    print(arguments.out)


if __name__ == "__main__":
    main()
