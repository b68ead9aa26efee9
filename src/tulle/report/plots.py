"""The pictures, as SVG strings. Input is plain numbers; units are in the parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tulle.report import labels, style, units

MARKERS = ("o", "s", "^", "D")
LARGEST_MARKER = 26.0
"""Diameter in points of the largest file's marker."""


def totals(rows: Sequence[tuple[str, float, float]]) -> str:
    """Stacked horizontal bars, one per (label, bytes of linears, bytes of the rest)."""
    with style.picture("totals", 6.4, 0.55 + 0.5 * len(rows)) as p:
        ax = p.axes
        longest = max(a + b for _, a, b in rows)
        for y, (_, linears, rest) in enumerate(rows):
            ax.barh(y, linears / 1e6, 0.62, color=style.ACCENT, label="linears" if y == 0 else None)
            ax.barh(y, rest / 1e6, 0.62, left=linears / 1e6, color=style.DENSE, label="rest" if y == 0 else None)
            ax.text((linears + rest) / 1e6 + longest / 1e8, y, units.size(linears + rest), va="center", fontsize=9.5)
        ax.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        ax.set_xlim(0, longest / 1e6 * 1.14)
        ax.invert_yaxis()
        ax.set_xlabel("MB")
        ax.grid(axis="y", visible=False)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    return p.svg


def size_per_block(dense_mb: Sequence[float], packed_mb: Mapping[str, Sequence[float]]) -> str:
    """Per block: the dense linears as a pale bar, the packed ones stacked by role in front of its right half."""
    blocks = range(len(dense_mb))
    with style.picture("size_per_block") as p:
        ax = p.axes
        ax.bar([b - 0.2 for b in blocks], dense_mb, 0.38, color=style.DENSE, label="dense")
        base = [0.0] * len(dense_mb)
        for role, sizes in packed_mb.items():
            ax.bar([b + 0.2 for b in blocks], sizes, 0.38, bottom=base, color=style.ROLES[role], label=role)
            base = [a + b for a, b in zip(base, sizes, strict=True)]
        block_axis(ax, len(dense_mb))
        ax.set_ylabel("MB")
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=5, columnspacing=1.2, handlelength=1)
    return p.svg


def matrix(
    name: str, rows: Sequence[str], values: Sequence[Sequence[float | None]], write: Callable[[float], str]
) -> str:
    """Heat map, one row per linear of a block, one column per block; ``None`` leaves a cell blank."""
    known = [v for row in values for v in row if v is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    columns = max(len(row) for row in values)
    with style.picture(name, 6.4, 0.55 + 0.33 * len(rows)) as p:
        ax = p.axes
        cells = [(x, y, v) for y, row in enumerate(values) for x, v in enumerate(row) if v is not None]
        steps = [style.ramp_index(v, low, high) for _, _, v in cells]
        ax.bar(
            [x for x, _, _ in cells], 0.92, 0.94, bottom=[y - 0.46 for _, y, _ in cells],
            color=[style.RAMP[step] for step in steps],
        )  # fmt: skip
        if columns <= 14:
            for (x, y, value), step in zip(cells, steps, strict=True):
                ax.text(x, y, write(value), ha="center", va="center", fontsize=8.5, color=style.ON_RAMP[step])
        ax.set_yticks(range(len(rows)), rows)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        block_axis(ax, columns)
        ax.grid(visible=False)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        if columns > 14:
            span = f"{write(low)} (pale) to {write(high)} (strong)" if high > low else f"{write(low)} everywhere"
            ax.set_title(span, fontsize=9, color=style.MUTED, loc="right")
    return p.svg


def error_per_linear(series: Mapping[str, tuple[str, Sequence[float | None]]]) -> str:
    """Relative output error, log scale: ``{linear: (role, error per block)}``."""
    with style.picture("error_per_linear", 6.4, 3.6) as p:
        ax = p.axes
        seen: dict[str, int] = {}
        shown = False
        for name, (role, errors) in series.items():
            marker = MARKERS[seen.get(role, 0) % len(MARKERS)]
            seen[role] = seen.get(role, 0) + 1
            points = [(b, e) for b, e in enumerate(errors) if e is not None and e > 0]
            if not points:
                continue
            shown = True
            ax.plot(
                *zip(*points, strict=True), color=style.ROLES[role], marker=marker, markersize=5.5, linewidth=1.4,
                markeredgecolor=style.PAPER, markeredgewidth=0.8, label=name,
            )  # fmt: skip
        if shown:
            ax.set_yscale("log")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=7, columnspacing=1.1, handlelength=1.4)
        block_axis(ax, max(len(errors) for _, errors in series.values()))
        ax.set_ylabel("relative error of the output")
    return p.svg


def block_error(errors: Sequence[float]) -> str:
    """Relative error of the residual stream after each block."""
    with style.picture("block_error", 6.4, 2.6) as p:
        ax = p.axes
        ax.plot(range(len(errors)), errors, color=style.ACCENT, marker="o", markersize=5.5, linewidth=1.8)
        ax.annotate(
            units.error(errors[-1]),
            (len(errors) - 1, errors[-1]),
            (0, 7),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
        )
        block_axis(ax, len(errors))
        ax.set_ylabel("relative error after the block")
        ax.set_ylim(0, max(errors) * 1.18 or 1)
    return p.svg


def durations(seconds: Mapping[str, float]) -> str:
    """Horizontal bars, longest first."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    longest = max(seconds.values(), default=1.0) or 1.0
    with style.picture("durations", 6.4, 0.6 + 0.34 * len(ordered)) as p:
        ax = p.axes
        for y, (_, value) in enumerate(ordered):
            ax.barh(y, value, 0.62, color=style.ACCENT)
            ax.text(value + longest / 100, y, units.duration(value), va="center", fontsize=9)
        ax.set_yticks(range(len(ordered)), [name.replace("_", " ") for name, _ in ordered])
        ax.invert_yaxis()
        ax.set_xlim(0, longest * 1.15)
        ax.set_xlabel("seconds")
        ax.grid(axis="y", visible=False)
    return p.svg


@dataclass(frozen=True)
class Point:
    """A model in a scatter plot."""

    name: str
    x: float
    y: float
    size: float
    """Bytes; the area of the marker."""
    kind: str
    """One of ``style.KINDS``."""
    title: str = ""
    """Shown by a browser over the marker."""


def models(name: str, points: Sequence[Point], x: str, y: str, height: float = 5.2) -> str:
    """Scatter of models with ``x`` and ``y`` as axis titles, y growing downwards: less is better.

    Dashed lines cross in the point of kind ``dense``. A marker's area is the file's size, its colour the kind.
    """
    with style.picture(name, 11.4, height) as p:
        ax = p.axes
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        largest = max(point.size for point in points)
        for point in points:
            if point.kind == "dense":
                ax.axhline(point.y, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 4)), zorder=1)
                ax.axvline(point.x, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 4)), zorder=1)
        # Large ones first, so that a small one is never hidden.
        for point in sorted(points, key=lambda point: -point.size):
            (artist,) = ax.plot(
                [point.x], [point.y], marker="o", markersize=_diameter(point.size, largest), linestyle="none",
                color=style.KINDS[point.kind], markeredgecolor=style.CARD, markeredgewidth=1.2, zorder=3,
            )  # fmt: skip
            p.title(artist, point.title or point.name)
        for axis, values in (("x", [point.x for point in points]), ("y", [point.y for point in points])):
            room = 0.12 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
            getattr(ax, f"set_{axis}lim")(min(values) - room, max(values) + room)
        ax.invert_yaxis()
        _legend(ax, points, largest)
        _label(p, points, largest)
    return p.svg


def _diameter(size: float, largest: float) -> float:
    """Of a marker, points: the area grows with the size."""
    return LARGEST_MARKER * math.sqrt(size / largest)


def _legend(ax: style.Axes, points: Sequence[Point], largest: float) -> None:
    """Colours of the kinds that occur, and two sizes."""
    kinds = [kind for kind in style.KINDS if any(point.kind == kind for point in points)]
    entries = [
        Line2D([], [], marker="o", markersize=8, linestyle="none", color=style.KINDS[kind], markeredgewidth=0,
               label=kind) for kind in kinds
    ]  # fmt: skip
    step = 10 ** math.floor(math.log10(largest))
    top = largest // step * step
    entries += [
        Line2D([], [], marker="o", markersize=_diameter(size, largest), linestyle="none", markerfacecolor="none",
               markeredgecolor=style.MUTED, label=f"{size / 1e6:g} MB") for size in (top / 4, top / 2)
    ]  # fmt: skip
    ax.legend(
        handles=entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(entries), columnspacing=1.8,
        handletextpad=0.6, handleheight=LARGEST_MARKER / 12, borderpad=0.5, borderaxespad=0.4,
    )  # fmt: skip


def _label(p: style.Picture, points: Sequence[Point], largest: float) -> None:
    """Names beside the markers, with a thin line where a name had to go far."""
    ax, scale = p.axes, p.figure.dpi / 72
    texts = [ax.text(0, 0, point.name, fontsize=9.5, ha="center", va="center", zorder=4) for point in points]
    for text in texts:
        text.set_in_layout(False)
    p.figure.draw_without_rendering()
    bounds = ax.get_window_extent()
    frame = labels.Box(
        (bounds.x0 + bounds.x1) / 2, (bounds.y0 + bounds.y1) / 2, bounds.width - 4 * scale, bounds.height - 4 * scale
    )
    markers, sizes = [], []
    for point, text in zip(points, texts, strict=True):
        x, y = ax.transData.transform((point.x, point.y))
        diameter = _diameter(point.size, largest) * scale
        markers.append(labels.Box(x, y, diameter, diameter))
        extent = text.get_window_extent()
        sizes.append((extent.width + 6 * scale, extent.height + 2 * scale))
    # The dashed lines through the dense model.
    lines = []
    for point, marker in zip(points, markers, strict=True):
        if point.kind == "dense":
            lines += [labels.Box(frame.x, marker.y, frame.width, 1.0), labels.Box(marker.x, frame.y, 1.0, frame.height)]
    inverse = ax.transData.inverted()
    placed = labels.place(markers, sizes, frame, lines)
    for point, marker, text, box in zip(points, markers, texts, placed, strict=True):
        text.set_position(tuple(inverse.transform((box.x, box.y))))
        near = (
            max(box.x - box.width / 2, min(marker.x, box.x + box.width / 2)),
            max(box.y - box.height / 2, min(marker.y, box.y + box.height / 2)),
        )
        if math.dist(near, (marker.x, marker.y)) > marker.width / 2 + 12 * scale:
            end = inverse.transform(near)
            ax.plot([point.x, end[0]], [point.y, end[1]], color=style.MUTED, linewidth=0.7, zorder=2)


def channels(absmax: Sequence[float]) -> str:
    """max|w| of each input channel, in order, with the median as a line."""
    with style.picture("channels", 6.4, 2.6) as p:
        ax = p.axes
        ax.vlines(range(len(absmax)), 0, absmax, color=style.ACCENT, linewidth=max(0.5, min(3.0, 380 / len(absmax))))
        median = sorted(absmax)[len(absmax) // 2]
        ax.axhline(median, color=style.INK, linewidth=1, linestyle=(0, (4, 4)))
        ax.set_xlim(-1, len(absmax))
        ax.set_ylim(0, max(absmax) * 1.08 or 1)
        ax.set_xlabel("input channel (dashed: the median channel)")
        ax.set_ylabel("max |w|")
    return p.svg


def horizontal(name: str, rows: Sequence[tuple[str, float]], unit: str) -> str:
    """Plain horizontal bars in the given order."""
    longest = max((value for _, value in rows), default=1.0) or 1.0
    with style.picture(name, 6.4, 0.6 + 0.34 * len(rows)) as p:
        ax = p.axes
        for y, (_, value) in enumerate(rows):
            ax.barh(y, value, 0.62, color=style.ACCENT)
            ax.text(value + longest / 100, y, units.significant(value, 3), va="center", fontsize=9)
        ax.set_yticks(range(len(rows)), [label for label, _ in rows])
        ax.invert_yaxis()
        ax.set_xlim(0, longest * 1.15)
        ax.set_xlabel(unit)
        ax.grid(axis="y", visible=False)
    return p.svg


def sensitivity(name: str, points: Sequence[tuple[str, str, float, float]], named: int = 3) -> str:
    """Scatter of (linear, role, output error, KL divergence), log-log; the ``named`` largest divergences by name."""
    points = [point for point in points if point[2] > 0 and point[3] > 0]
    with style.picture(name, 6.4, 4.4) as p:
        ax = p.axes
        for role, color in style.ROLES.items():
            xy = [(x, y) for _, r, x, y in points if r == role]
            if xy:
                ax.plot(
                    *zip(*xy, strict=True), color=color, marker="o", markersize=7, linestyle="none",
                    markeredgecolor=style.PAPER, markeredgewidth=0.8, label=role.replace("_", "/"),
                )  # fmt: skip
        if points:
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=4, columnspacing=1.2, handletextpad=0.2)
            for one in (ax.xaxis, ax.yaxis):
                one.set_major_locator(LogLocator(subs=(1, 2, 5)))
                one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                one.set_minor_formatter(NullFormatter())
        for rank, (label, _, x, y) in enumerate(sorted(points, key=lambda point: -point[3])[:named]):
            # Above and below in turn: neighbours in rank are neighbours in height.
            ax.annotate(
                label, (x, y), (0, -12 if rank % 2 else 11), textcoords="offset points", ha="center", va="center",
                fontsize=9,
            )  # fmt: skip
        ax.margins(0.12)
        ax.set_xlabel("relative error at the linear's output")
        ax.set_ylabel("KL divergence at the logits, nats")
    return p.svg


def block_axis(ax: style.Axes, blocks: int) -> None:
    ax.set_xlabel("block")
    ax.set_xlim(-0.5, blocks - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
