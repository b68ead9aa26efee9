"""The page of ``tulle law fit``: loss against sparsity, the optimum, and how well the law holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tulle.laws import MOST_SPARSE, Fit, Law
from tulle.report import style, units
from tulle.report.page import chart, folded, render, table, tile, write_page
from tulle.report.plots import MARKERS

COLORS = (style.ROLES["qkv"], style.ROLES["o"], style.ROLES["gate_up"], style.ROLES["down"], style.ACCENT, style.INK)


def write_laws(found: Mapping[str, Any], file: Path) -> None:
    """Writes the page for what ``tulle law fit`` found."""
    write_page(file, laws_page(found))


def laws_page(found: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file."""
    tiles, charts = [], []
    for kind, content in found["laws"].items():
        fit = Fit.from_json(content)
        name = f", {kind}" if kind else ""
        ends = content.get("optimum_interval")
        detail = f"95 %: {units.percent(ends[0])} – {units.percent(ends[1])}" if ends else ""
        tiles.append(tile(f"Best sparsity{name}", units.percent(fit.law.optimum), detail))
        tiles.append(tile(f"Runs{name}", str(len(fit.runs)), f"{len(content['held_out'])} held out"))
        charts += _charts(kind, name, fit, content["held_out"])
    return render(
        "charts.html", title="Scaling law", subtitle="L(N, S) = E + (B + C·e^(β/(1−S)))/N^α", tiles=tiles, charts=charts
    )


def _charts(kind: str, name: str, fit: Fit, held: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    error = max(abs(float(fit.law.loss(r.size, r.sparsity)) / r.loss - 1) for r in fit.runs)
    rows = [
        (f"{r.size:,.0f}", units.percent(r.sparsity), f"{r.loss:.4f}", f"{fit.law.loss(r.size, r.sparsity):.4f}")
        for r in fit.runs
    ]
    constants = ", ".join(f"{key} {value:.3g}" for key, value in fit.law.to_json().items())
    return [
        chart(
            f"Loss against sparsity{name}",
            f"Points are runs, crosses held-out ones, lines the law: {constants}.",
            loss_against_sparsity(f"loss-{kind}", fit, held),
            below=folded("Runs", table(("parameters", "sparsity", "loss", "law"), rows, 0)),
        ),
        chart(
            f"Loss at equal active parameters{name}",
            "What a token reads is the same along a line; the model grows with its sparsity. The band is where 95 % of "
            "the bootstrap's optima lie.",
            loss_of_active(f"active-{kind}", fit),
        ),
        chart(
            f"Law against run{name}",
            f"The law is off by {units.percent(error)} of the loss at the most.",
            law_against_run(f"parity-{kind}", fit, held),
        ),
    ]


def loss_against_sparsity(name: str, fit: Fit, held: list[Mapping[str, Any]]) -> str:
    """Points and law, a line per size; held-out runs as crosses."""
    sizes = sorted({run.size for run in fit.runs} | {run["size"] for run in held})
    reach = max([run.sparsity for run in fit.runs] + [run["sparsity"] for run in held])
    grid = np.linspace(0, min(reach + 0.1, MOST_SPARSE), 100)
    with style.picture(name, 6.4, 4.0) as p:
        for number, size in enumerate(sizes):
            color = COLORS[number % len(COLORS)]
            own = [run for run in fit.runs if run.size == size]
            p.axes.plot(grid, fit.law.loss(size, grid), color=color, linewidth=1.4)
            p.axes.plot(
                [r.sparsity for r in own], [r.loss for r in own], color=color, linestyle="none",
                marker=MARKERS[number % len(MARKERS)], markersize=6, markeredgecolor=style.PAPER, label=_count(size),
            )  # fmt: skip
            crosses = [run for run in held if run["size"] == size]
            p.axes.plot(
                [r["sparsity"] for r in crosses], [r["loss"] for r in crosses], color=color, linestyle="none",
                marker="x", markersize=8, markeredgewidth=2,
            )  # fmt: skip
        _sparsity_axis(p.axes)
        p.axes.set_ylabel("loss, nats per token")
        p.axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=min(6, len(sizes)), handletextpad=0.3)
    return p.svg


def loss_of_active(name: str, fit: Fit) -> str:
    """L against S at fixed active parameters, with the optimum and its interval."""
    low, high = (pick(run.size * (1 - run.sparsity) for run in fit.runs) for pick in (min, max))
    grid = np.linspace(0, 0.9, 181)
    with style.picture(name, 6.4, 4.0) as p:
        if fit.replicates:
            ends = fit.interval(law.optimum for law in fit.replicates)
            p.axes.axvspan(*ends, color=style.DENSE, alpha=0.35, linewidth=0)
        p.axes.axvline(fit.law.optimum, color=style.INK, linewidth=1, linestyle=(0, (4, 4)))
        curves = []
        for number, active in enumerate(np.geomspace(low, high, 3)):
            color = COLORS[number]
            curves.append(fit.law.loss_of_active(active, grid))
            if fit.replicates:
                _band(p.axes, grid, active, fit.replicates, color)
            p.axes.plot(grid, curves[-1], color=color, linewidth=1.6, label=_count(active))
            best = fit.law.optimum
            p.axes.plot([best], [fit.law.loss_of_active(active, best)], marker="o", color=color, markersize=6)
        # Where runs were, and a little beyond: some replicate of few runs goes anywhere at 90 %.
        p.axes.set_ylim(*loss_range(curves, grid, max(run.sparsity for run in fit.runs)))
        _sparsity_axis(p.axes)
        p.axes.set_ylabel("loss, nats per token")
        p.axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3, handletextpad=0.4, title="active parameters"
        )
    return p.svg


def loss_range(curves: list[np.ndarray], sparsities: np.ndarray, reach: float) -> tuple[float, float]:
    """Bottom and top of a picture that shows curves up to a sparsity."""
    seen = np.stack(curves)[:, sparsities <= reach]
    low, high = float(seen.min()), float(seen.max())
    return low - 0.3 * (high - low), high + 0.3 * (high - low)


def law_against_run(name: str, fit: Fit, held: list[Mapping[str, Any]]) -> str:
    """Relative difference of law and run, by loss."""
    with style.picture(name, 6.4, 3.2) as p:
        ax = p.axes
        ax.axhline(0, color=style.MUTED, linewidth=1)
        points = [(r.loss, float(fit.law.loss(r.size, r.sparsity))) for r in fit.runs]
        ax.plot(
            [loss for loss, _ in points], [law / loss - 1 for loss, law in points], linestyle="none", marker="o",
            color=style.ACCENT, markersize=6, markeredgecolor=style.PAPER, label="fitted",
        )  # fmt: skip
        if held:
            ax.plot(
                [r["loss"] for r in held], [r["predicted"] / r["loss"] - 1 for r in held], linestyle="none", marker="x",
                color=style.INK, markersize=8, markeredgewidth=2, label="held out",
            )  # fmt: skip
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2, handletextpad=0.3)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.2g} %"))
        ax.margins(y=0.2)
        ax.set_xlabel("loss of the run, nats per token")
        ax.set_ylabel("law − run")
    return p.svg


def _band(ax: style.Axes, grid: Any, active: float, laws: tuple[Law, ...], color: str) -> None:
    values = np.array([law.loss_of_active(active, grid) for law in laws])
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    ax.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)


def _sparsity_axis(ax: style.Axes) -> None:
    ax.set_xlabel("sparsity: share of weights that a token does not read")
    ax.xaxis.set_major_locator(MaxNLocator(10))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.percent(value)))


def _count(value: float) -> str:
    for suffix, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{units.significant(value / scale, 3)} {suffix}"
    return f"{value:.0f}"
