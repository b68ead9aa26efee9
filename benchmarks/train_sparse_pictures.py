"""Pictures of ``train_sparse.py``'s cells (``--pictures FOLDER``): what has finished is drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Cells = dict[str, dict[str, Any]]
WAYS = ("dense,\nthen prune", "prune\nwhile", "from\none-shot", "from sparse-\npretrained")


def draw(cells: Cells, folder: Path) -> None:
    """PNG files into ``folder``, of the seed with the most cells."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = Counter(key.partition("/")[0] for key in cells)
    seed = max(seeds, key=seeds.__getitem__, default="0")
    own = {k.removeprefix(f"{seed}/"): v for k, v in cells.items() if k.startswith(f"{seed}/")}
    _pretraining(own, folder / "train-sparse-pretraining.png")
    for task in ("narrow", "broad"):
        _ways(own, task, folder / f"train-sparse-{task}.png")
    # What learns masks from scratch, at the rate that was tried as well where there is one.
    tuned = {k.removeprefix("rate 0.001/"): v for k, v in own.items() if k.startswith("rate 0.001/")}
    own = tuned or own
    _lines(own, [n for n in own if n.startswith("2:4/")], "sad", "share of mask bits changed per step",
           folder / "train-sparse-sad.png", log=True)  # fmt: skip
    _lines(own, [n for n in own if n.startswith("top_kast/")], "mask_change", "share of the mask replaced by a refresh",
           folder / "train-sparse-top-kast.png")  # fmt: skip
    runs = ["dense", *(n for n in own if n.startswith(("2:4/", "top_kast/")))]
    _lines(own, runs, "held_out_bits_per_byte", "held-out bits per byte", folder / "train-sparse-scratch.png")


def _pretraining(cells: Cells, file: Path) -> None:
    """Held-out bits per byte over all tokens of dense training and of the road 50 % → 70 %."""
    if "sparse 50, 1" not in cells:
        return
    base = cells["dense"]["tokens_seen"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    chains = {
        "dense": ["dense, 1", "dense, 2"],
        "50 %": ["sparse 50, 1", "sparse 50, 2"],
        "50 % → 70 %": ["sparse 50, 1", "sparse 70, 2"],
        "70 % at once": ["sparse 70 at once, 2"],
        "gradual to 70 %": ["gradual 70, 2"],
    }
    for label, chain in chains.items():
        x: list[float] = []
        y: list[float] = []
        seen = base
        for name in chain:
            if name not in cells:
                continue
            for row in cells[name]["rows"]:
                x.append((seen + row["tokens"]) / 1e6)
                y.append(row["held_out_bits_per_byte"])
            seen += cells[name]["tokens_seen"]
        if x:
            axes.plot(x, y, label=label)
    # Curves are estimates on some windows, cells' figures of the whole text: points go onto the curves' scale.
    shift = cells["dense"]["rows"][-1]["held_out_bits_per_byte"] - cells["dense"]["held_out_bits_per_byte"]
    for share, marker in ((50, "v"), (70, "s")):
        for name, place in ((f"one-shot {share}", base), (f"dense, 2, one-shot {share}", base * 2)):
            if name in cells:
                axes.plot(place / 1e6, cells[name]["held_out_bits_per_byte"] + shift, marker, color="0.3",
                          label=f"one-shot {share} %" if place == base else None)  # fmt: skip
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def _ways(cells: Cells, task: str, file: Path) -> None:
    """Recovery (dense bits per byte over sparse) of the four ways, without and with SquareHead."""
    if f"{task}/dense" not in cells or not any(k.startswith((f"{task}/70/", f"{task}/50/")) for k in cells):
        return
    dense = cells[f"{task}/dense"]["held_out_bits_per_byte"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, share in zip(panels, (50, 70), strict=True):
        for offset, mark, color in ((-0.2, "", "tab:blue"), (0.2, "+SquareHead", "tab:orange")):
            for way in range(1, 5):
                cell = cells.get(f"{task}/{share}/{way}{mark}")
                if cell is not None:
                    value = 100 * dense / cell["held_out_bits_per_byte"]
                    axes.bar(way + offset, value, 0.38, color=color)
                    axes.text(way + offset, value, f"{value:.1f}", ha="center", va="bottom", fontsize=7)
        axes.axhline(100, color="0.4", linewidth=0.8)
        axes.set_title(f"{task}, {share} %", fontsize=10)
        axes.set_xticks(range(1, 5), WAYS, fontsize=8)
        axes.set_ylim(90, 103)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("recovery (% of the dense fine-tune)")
    panels[0].plot([], [], color="tab:blue", label="cross-entropy")
    panels[0].plot([], [], color="tab:orange", label="with SquareHead")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def _label(name: str) -> str:
    group, _, last = name.rpartition("/")
    return f"Top-KAST {last}" if group == "top_kast" and not last.startswith("static") else last


def _lines(cells: Cells, names: list[str], key: str, label: str, file: Path, log: bool = False) -> None:
    found = {n: [r for r in cells[n]["rows"] if key in r] for n in names if n in cells}
    found = {n: rows for n, rows in found.items() if len(rows) > 1}
    if not found:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in found.items():
        axes.plot([r["tokens"] / 1e6 for r in rows], [r[key] for r in rows], label=_label(name))
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
