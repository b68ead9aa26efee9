"""Cards on sparse activations: what share of its inputs a token leaves out, what it reads, what neighbours share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter

from tulle.report import style, units
from tulle.report.cells import reads
from tulle.report.page import chart, tile
from tulle.report.plots import MARKERS, block_axis

Rows = Sequence[Mapping[str, Any]]
"""Of ``tulle.inspect.activity``: block, role, weights, active, sparsity, overlap, chance."""


def activity_tile(rows: Rows) -> dict[str, str]:
    """The headline: weights that a token reads."""
    weights, active = (sum(row[key] for row in rows) for key in ("weights", "active"))
    return tile("Read per token", units.percent(active / max(weights, 1)), f"{active / 1e6:,.2f} M of the linears")


def activity_charts(rows: Rows, tokens: int) -> list[dict[str, Any]]:
    """Three cards; none without rows."""
    if not rows:
        return []
    blocks = 1 + max(row["block"] for row in rows)
    roles = list(dict.fromkeys(row["role"] for row in rows))
    weights, active = (sum(row[key] for row in rows) for key in ("weights", "active"))
    overlap, chance = (
        sum(row["active"] * row[key] for row in rows) / max(active, 1e-12) for key in ("overlap", "chance")
    )
    return [
        chart(
            "Activation sparsity",
            f"Share of the inputs that are zero where the weights read them, over {tokens:,} tokens. Dashed: the share "
            f"of all stored weights that a token does not read, {units.percent(1 - active / max(weights, 1))}.",
            activation_sparsity(rows, roles, blocks),
        ),
        chart(
            "Weights read per token",
            "Millions of weights of the linears: stored (pale), and behind an input that is not zero. "
            f"{active / 1e6:,.2f} of {weights / 1e6:,.2f} M in all; the head is read as well, and one row of the "
            "embedding.",
            weights_read(rows, roles, blocks),
        ),
        chart(
            "Overlap of neighbouring tokens",
            "Share of a token's active inputs that were active for the token before it (points), and what independent "
            "choices at each channel's own rate would give (ticks). Weights behind shared inputs are read once for "
            f"both: on average {units.percent(overlap)}, by chance {units.percent(chance)}.",
            neighbours(rows, roles, blocks),
        ),
    ]


def activation_sparsity(rows: Rows, roles: Sequence[str], blocks: int) -> str:
    """Zero inputs by block, a line per role."""
    weights, active = (sum(row[key] for row in rows) for key in ("weights", "active"))
    with style.picture("activation-sparsity", 6.4, 3.4) as p:
        p.axes.axhline(1 - active / max(weights, 1), color=style.INK, linewidth=1, linestyle=(0, (4, 4)))
        for number, role in enumerate(roles):
            points = [(row["block"], row["sparsity"]) for row in rows if row["role"] == role]
            _line(p.axes, number, role, points, len(roles))
        _share_axis(p.axes, blocks)
        p.axes.set_ylabel("zero inputs")
        p.axes.set_ylim(bottom=0)
    return p.svg


def weights_read(rows: Rows, roles: Sequence[str], blocks: int) -> str:
    """Per block: all weights as a pale bar, those read stacked by role in front of it."""
    with style.picture("weights-read", 6.4, 3.2) as p:
        ax = p.axes
        whole = [sum(row["weights"] for row in rows if row["block"] == b) / 1e6 for b in range(blocks)]
        ax.bar([b - 0.2 for b in range(blocks)], whole, 0.38, color=style.DENSE, label="stored")
        base = [0.0] * blocks
        for role in roles:
            read = [
                sum(row["active"] for row in rows if (row["block"], row["role"]) == (b, role)) / 1e6
                for b in range(blocks)
            ]
            ax.bar(
                [b + 0.2 for b in range(blocks)], read, 0.38, bottom=base, color=style.of_role(role), label=reads(role)
            )
            base = [a + b for a, b in zip(base, read, strict=True)]
        block_axis(ax, blocks)
        ax.set_ylabel("million weights")
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=5, columnspacing=1.2, handlelength=1)
    return p.svg


def neighbours(rows: Rows, roles: Sequence[str], blocks: int) -> str:
    """Overlap by block, a line per role, with a tick at chance."""
    with style.picture("overlap", 6.4, 3.4) as p:
        for number, role in enumerate(roles):
            own = [row for row in rows if row["role"] == role]
            _line(p.axes, number, role, [(row["block"], row["overlap"]) for row in own], len(roles))
            p.axes.plot(
                [row["block"] + _offset(number, len(roles)) for row in own], [row["chance"] for row in own],
                color=style.of_role(role), linestyle="none", marker="_", markersize=9, markeredgewidth=1.8,
            )  # fmt: skip
        _share_axis(p.axes, blocks)
        p.axes.set_ylabel("shared with the token before")
    return p.svg


def _offset(number: int, of: int) -> float:
    """Side by side: equal shares are the usual case."""
    return (number - (of - 1) / 2) * 0.12


def _line(ax: style.Axes, number: int, role: str, points: Sequence[tuple[int, float]], of: int) -> None:
    ax.plot(
        [block + _offset(number, of) for block, _ in points], [share for _, share in points], color=style.of_role(role),
        marker=MARKERS[number % len(MARKERS)], markersize=5.5, linewidth=1.2, markeredgecolor=style.PAPER,
        markeredgewidth=0.8, label=reads(role),
    )  # fmt: skip


def _share_axis(ax: style.Axes, blocks: int) -> None:
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.percent(value)))
    block_axis(ax, blocks)
    ax.margins(y=0.12)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=4, columnspacing=1.2, handlelength=1.4)
