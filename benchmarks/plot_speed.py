"""Draws the runs of speed.py: tokens per second of ours and the peers', and what memory alone would allow.

    python benchmarks/plot_speed.py [--out docs/pictures/speed.png]
    python benchmarks/plot_speed.py --short [--out docs/pictures/readme-speed.png]

``--short`` draws the few bars that the README shows. Reads benchmarks/results/decode.json and prefill.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS, PEER, BOUND = "#2563eb", "#9ca3af", "#111827"
SHORT = {
    "llama.cpp F32": "llama.cpp F32",
    "llama.cpp BF16": "llama.cpp BF16",
    "llama.cpp Q8_0": "llama.cpp Q8_0",
    "onnxruntime int4": "ONNX Runtime int4",
    "llama.cpp Q4_0": "llama.cpp Q4_0",
    "tulle int4, 8-bit inputs": "Tulle int4",
    "tulle int4 50 %, 8-bit inputs": "Tulle int4, 50 % zeros",
    "tulle int4 70 %, 8-bit inputs": "Tulle int4, 70 % zeros",
}
"""Rows of the README's picture and what they are called there. All 4-bit rows round inputs to 8 bits."""


def draw(axes: Any, run: dict[str, Any], title: str, bound: bool) -> None:
    """A bar per model, fastest first, and where reading its bytes alone would end."""
    rows = sorted(run["results"].items(), key=lambda row: row[1]["tokens_per_s"])
    places = range(len(rows))
    rates = [found["tokens_per_s"] for _, found in rows]
    axes.barh(
        places, rates, color=[OURS if name.lower().startswith("tulle") else PEER for name, _ in rows], height=0.72
    )
    for place, rate in zip(places, rates, strict=True):
        axes.text(rate, place, f" {rate:.0f}" if rate >= 10 else f" {rate:.1f}", va="center", fontsize=8,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip
    if bound:
        limits = [1e9 * run["read_gb_s"] / found["bytes"] for _, found in rows]
        axes.plot(limits, places, "|", color=BOUND, markersize=9, markeredgewidth=1.5, zorder=5)
        axes.plot([], [], "|", color=BOUND, markersize=9, label=f"its bytes at {run['read_gb_s']:.0f} GB/s")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.set_yticks(places, [name.replace("filled up", "densified") for name, _ in rows], fontsize=8)
    axes.set_xlabel("tokens per second")
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.12 * max([*rates, *(limits if bound else [])]))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--short", action="store_true", help="The README's picture.")
    arguments = parser.parse_args()
    name = "readme-speed.png" if arguments.short else "speed.png"
    out = arguments.out or HERE.parent / "docs/pictures" / name
    from matplotlib.figure import Figure

    runs = {what: json.loads((HERE / f"results/{what}.json").read_text()) for what in ("decode", "prefill")}
    if arguments.short:
        run = runs["decode"]
        run["results"] = {shown: run["results"][name] for name, shown in SHORT.items()}
        figure = Figure(figsize=(8, 3), layout="constrained")
        draw(figure.subplots(), run, "Decoding, 1.1 B parameters, 2 threads", False)
        figure.savefig(out, dpi=150)
        return print(out)
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    sizes = [len(run["results"]) for run in runs.values()]
    upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": sizes})
    machine = runs["decode"]["machine"]
    draw(upper, runs["decode"], f"Decoding, 1.1 B parameters, {machine['threads']} threads ({machine['cpu']})", True)
    draw(lower, runs["prefill"], "A prompt of 512 tokens", False)
    figure.savefig(out, dpi=150)
    print(out)


if __name__ == "__main__":
    main()
