"""What the page of a compression shows of sparse linears: how sparse, where, and what a permutation saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from tulle.report import masks, style, units
from tulle.report.cells import reads
from tulle.report.page import chart, folded, panels, table
from tulle.report.plots import MARKERS, block_axis

Linears = Sequence[Mapping[str, Any]]

PERMUTED = ("blocks", "linears", "pattern", "order folded into", "without", "with", "ideal", "of the gap", "time")


def sparsity_charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cards of a report; none for a model without sparse linears."""
    linears = report["linears"]
    if not any(linear["sparsity"] for linear in linears):
        return []
    return [_sparsity(report), *_masks(linears), *_permutations(report["blocks"])]


def _sparsity(report: Mapping[str, Any]) -> dict[str, Any]:
    linears, blocks = report["linears"], len(report["blocks"])
    sparse = [x for x in linears if x["sparsity"]]
    roles = [role for role in style.ROLES if any(x["role"] == role for x in sparse)]
    series = {role: [_of_role(linears, role, block) for block in range(blocks)] for role in roles}
    low, high = (pick(sparse, key=lambda x: x["sparsity"]) for pick in (min, max))
    note = "Share of weights that are exactly zero and are not stored: "
    if round(high["sparsity"] - low["sparsity"], 3):
        note += (
            f"{units.percent(low['sparsity'])} ({low['name']}) to {units.percent(high['sparsity'])} ({high['name']})."
        )
    else:
        note += f"{units.percent(high['sparsity'])} in every pruned linear."
    left = [reads(role) for role in dict.fromkeys(x["role"] for x in linears) if role not in roles]
    if left:
        note += f" Not pruned: {', '.join(left)}."
    return chart("Sparsity", note, by_role(series, report["totals"]["sparsity"]), text=f"Sparsity by block. {note}")


def _of_role(linears: Linears, role: str, block: int) -> tuple[float, str] | None:
    """Sparsity of a role's linears in a block, and what it consists of."""
    found = [x for x in linears if x["role"] == role and x["block"] == block]
    if not found:
        return None
    weights = [x["shape"][0] * x["shape"][1] for x in found]
    mean = sum(n * x["sparsity"] for n, x in zip(weights, found, strict=True)) / sum(weights)
    text = f"{reads(role)}, block {block}: {units.percent(mean)}"
    if len({round(x["sparsity"], 3) for x in found}) > 1:
        parts = ", ".join(f"{_short(x)} {units.percent(x['sparsity'])}" for x in found)
        text += f" ({parts})"
    return mean, text


def by_role(series: Mapping[str, Sequence[tuple[float, str] | None]], mean: float) -> str:
    """Sparsity by block, a line per role: ``{role: (share, title) per block}``; ``mean`` of all linears as a dash."""
    with style.picture("sparsity", 6.4, 3.2) as p:
        ax = p.axes
        known = [mean, *(found[0] for points in series.values() for found in points if found is not None)]
        blocks = max(len(points) for points in series.values())
        ax.axhline(mean, color=style.INK, linewidth=1, linestyle=(0, (4, 4)), label=f"mean {units.percent(mean)}")
        for number, (role, points) in enumerate(series.items()):
            # Side by side: equal sparsities are the usual case.
            offset = (number - (len(series) - 1) / 2) * 0.16
            xy = [(b + offset, found[0]) for b, found in enumerate(points) if found is not None]
            ax.plot(
                *zip(*xy, strict=True), color=style.ROLES[role], marker=MARKERS[number % len(MARKERS)], markersize=5.5,
                linewidth=1.2, markeredgecolor=style.PAPER, markeredgewidth=0.8, label=reads(role),
            )  # fmt: skip
        for number, points in enumerate(series.values()):
            offset = (number - (len(series) - 1) / 2) * 0.16
            for b, found in enumerate(points):
                if found is not None:
                    (target,) = ax.plot([b + offset], [found[0]], marker="o", markersize=10, alpha=0)
                    p.title(target, found[1])
        low, high = min(known), max(known)
        # At least ten points, so that rounding is not drawn as a difference.
        margin = max(0.1 * (high - low), (0.1 - (high - low)) / 2)
        ax.set_ylim(low - margin, high + margin)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.percent(value)))
        block_axis(ax, blocks)
        ax.set_ylabel("zero weights")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=5, columnspacing=1.2, handlelength=1.4)
    return p.svg


def _masks(linears: Linears) -> list[dict[str, Any]]:
    """The first masked linear of each role in the first, the middle and the last block that has any."""
    masked = [x for x in linears if x.get("mask")]
    if not masked:
        return []
    blocks = list(dict.fromkeys(x["block"] for x in masked))
    chosen = list(dict.fromkeys((blocks[0], blocks[len(blocks) // 2], blocks[-1])))
    shown = []
    for role in dict.fromkeys(x["role"] for x in masked):
        for block in chosen:
            shown += [x for x in masked if x["role"] == role and x["block"] == block][:1]
    low, high = masks.span(x["mask"] for x in shown)
    parts = []
    for x in shown:
        name = f"{_short(x)}, block {x['block']}"
        facts = [
            "×".join(map(str, x["shape"])), f"{units.percent(1 - x['sparsity'])} kept", x["pattern"],
            masks.emptiness(x["mask"]),
        ]  # fmt: skip
        parts.append((name, " · ".join(filter(None, facts)), masks.picture(name, x["mask"], low, high)))
    shaded = not all(masks.even(x["mask"]) for x in shown)
    return [
        chart(
            "Where weights are kept",
            "One linear of each role; rows are output channels, columns input channels. "
            + "Tiles are shaded by the share of their weights that is kept, alike in all pictures. " * shaded
            + "Single rows and columns: the mean of those in a tile (line), and from the least to the greatest of them "
            "(band). All masks are in report.json.",
            masks.key(low, high) * shaded + panels(parts, len(chosen)),
            wide=True,
            text="",
        )
    ]


def _permutations(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [(block["index"], x) for block in blocks for x in block.get("permutations", ())]
    if not found:
        return []
    moved = [(index, x) for index, x in found if x["folded"]]
    figures = table(PERMUTED, [_moved_row(index, x) for index, x in moved] + _left_rows(found), 4)
    if not moved:
        return [chart("Channel permutation", "Every order was left alone.", figures, wide=True, text="")]
    before, after, ideal = (
        sum(x[key] for _, x in moved) / len(moved) for key in ("kept_before", "kept_after", "ideal")
    )
    parts = []
    for role in dict.fromkeys(x["role"] for _, x in moved):
        of_role = [(index, x) for index, x in moved if x["role"] == role]
        facts = f"order folded into {', '.join(dict.fromkeys(x['folded'] for _, x in of_role))}"
        svg = retained(role, [(i, x["kept_before"], x["kept_after"], x["ideal"]) for i, x in of_role], len(blocks))
        parts.append((reads(role), facts, svg))
    return [
        chart(
            "Retained by the N:M mask, without and with channel permutation",
            f"Share of the score that the mask keeps: {units.percent(before)} → {units.percent(after)} on average. "
            f"Ideal ({units.percent(ideal)}): the best N of M of each row, were its channels free.",
            panels(parts, 2),
            wide=True,
            text="",
            below=folded("Figures", figures),
        )
    ]


def retained(role: str, points: Sequence[tuple[int, float, float, float]], blocks: int) -> str:
    """Per block a dumbbell from the share kept without to that with permutation, and a tick at the ideal one:
    ``(block, without, with, ideal)``."""
    with style.picture(f"retained-{role}", 6.4, 2.7) as p:
        ax, color = p.axes, style.ROLES[role]
        numbers = [b for b, _, _, _ in points]
        without, kept, ideal = ([point[i] for point in points] for i in (1, 2, 3))
        ax.vlines(numbers, without, kept, color=color, linewidth=2)
        ax.plot(
            numbers, without, linestyle="none", marker="o", markersize=6, markerfacecolor=style.CARD,
            markeredgecolor=color, markeredgewidth=1.5, label="without",
        )  # fmt: skip
        ax.plot(numbers, kept, linestyle="none", marker="o", markersize=6.5, color=color, label="with")
        ax.plot(
            numbers, ideal, linestyle="none", marker="_", markersize=9, color=style.MUTED, markeredgewidth=1.8,
            label="ideal",
        )  # fmt: skip
        for b, *shares in points:
            (target,) = ax.plot([b, b], [min(shares), max(shares)], linewidth=12, alpha=0)
            first, second, best = map(units.percent, shares)
            p.title(target, f"block {b}: {first} without, {second} with, {best} ideal")
        block_axis(ax, blocks)
        ax.margins(y=0.12)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.percent(value)))
        ax.set_ylabel("score kept")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, columnspacing=1.4, handletextpad=0.3)
    means = ", ".join(
        f"{units.percent(sum(values) / len(values))} {name}"
        for name, values in (("without", without), ("with", kept), ("ideal", ideal))
    )
    return style.labelled(p.svg, f"{reads(role)}, mean over the blocks: {means}")


def _moved_row(index: int, x: Mapping[str, Any]) -> tuple[str, ...]:
    gap = x["ideal"] - x["kept_before"]
    return (
        str(index), reads(x["role"]), x["pattern"], x["folded"],
        *(units.percent(x[key]) for key in ("kept_before", "kept_after", "ideal")),
        units.percent((x["kept_after"] - x["kept_before"]) / gap) if gap > 0 else "–",
        units.duration(x["seconds"]),
    )  # fmt: skip


def _left_rows(found: Sequence[tuple[int, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """What was left alone, once per role and reason."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for index, x in found:
        if not x["folded"]:
            alike.setdefault((x["role"], x["pattern"], x.get("reason", "")), []).append(index)
    return [
        (_ranges(indices), reads(role), pattern, f"left alone{': ' * bool(reason)}{reason}", *"–––––")
        for (role, pattern, reason), indices in alike.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """``0–3, 7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _short(linear: Mapping[str, Any]) -> str:
    return linear["name"].rsplit(".", 1)[-1].removesuffix("_proj")
