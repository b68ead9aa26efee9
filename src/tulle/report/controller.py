"""What a Scaling Transformer's controllers choose, as pictures and as a page, from :mod:`tulle.inspect.controllers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tulle.report import style, units
from tulle.report.page import chart, panels, render, table, tile, write_page

COLUMNS = (
    "layer", "units", "dead", "effective units of N", "favourite's share", "load variation", "by chance",
    "changed", "without memory", "certainty",
)  # fmt: skip
MAP_BLOCKS = 128
"""Blocks that a picture of usage shows."""


def write_controllers(found: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for the result of :func:`tulle.inspect.controllers.inspect_controllers`."""
    write_page(Path(file), controllers_page(found))


def controllers_page(found: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file."""
    a, layers = found["architecture"], found["layers"]
    read, whole = a["feed_forward_weights_read"], a["feed_forward_weights"]
    dead, count = sum(x["dead"] for x in layers), sum(x["units"] for x in layers)
    return render(
        "charts.html",
        title=found["model"],
        subtitle=describe(a),
        tiles=[
            tile("Read per token", units.percent(read / whole), "of the feed-forward, its controller included"),
            tile("Dead units", units.percent(dead / count), f"{dead:,} of {count:,} on {found['tokens']:,} tokens"),
            tile("Changed", units.percent(mean(layers, "changed")), "of the choices, from one token to the next"),
            tile("Effective units", f"{mean(layers, 'effective_units'):.1f} of {a['block']}", "in a block, by entropy"),
        ],
        charts=controller_charts(found),
    )


def describe(architecture: Mapping[str, Any]) -> str:
    """``1,107,856 parameters, 3 layers, d 128, d_ff 1152, one unit in 64, controller of rank 16, sparse QKV (S 8)``."""
    a = architecture
    attention = "dense QKV" if a["qkv_modules"] is None else f"sparse QKV (S {a['qkv_modules']})"
    return (
        f"{a['parameters']:,} parameters, {a['layers']} layers, d {a['hidden']}, d_ff {a['intermediate']}, one unit in "
        f"{a['block']}, controller of rank {a['controller_rank']}, {attention}"
    )


def controller_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cards of the page, for any page."""
    layers, tokens = found["layers"], found["tokens"]
    shares = [np.array(layer["counts"]) / tokens for layer in layers]
    maps = [
        (f"Layer {i}", f"{layer['dead']:,} of {layer['units']:,} units dead", usage_map(f"usage-{i}", share))
        for i, (layer, share) in enumerate(zip(layers, shares, strict=True))
    ]
    lines = [
        (
            f"Layer {i}",
            f"{units.percent(layer['changed'])} change",
            timeline(f"timeline-{i}", layer["shown"], found["text"]),
        )
        for i, layer in enumerate(layers)
    ]
    return [
        chart("Layers", f"On {tokens:,} tokens, choices of decoding (argmax). {LEGEND}", statistics(layers), wide=True),
        chart(
            "Load",
            "Share of tokens that choose a unit, times N: 1 where all units of a block are used alike. Units of a "
            "layer in order of use.",
            load([share * found["architecture"]["block"] for share in shares]),
        ),
        chart(
            "Change from token to token",
            "Share of blocks that choose another unit than for the token before (bars), and what tokens in random "
            "order would give (marks).",
            change([x["changed"] for x in layers], [x["chance_changed"] for x in layers]),
        ),
        chart(
            "Usage of every unit",
            "One column per block, one cell per unit, in order of use within the block; dark: never chosen, bright: "
            f"chosen by every token, square root scale. At most {MAP_BLOCKS} blocks are shown.",
            panels(maps, 2),
            wide=True,
            text="",
        ),
        chart(
            "Choices along a text",
            f"The first {len(found['text'])} tokens, one row each; the colour is the unit that a block chooses. A "
            "column of one colour is a block that does not look at the token.",
            panels(lines, 2),
            wide=True,
            text="",
        ),
    ]


LEGEND = (
    "Effective units: the exponential of the usage's entropy, N when all are used alike. Load variation: standard "
    "deviation over mean of the units' counts, beside that of choices at random. Without memory: change if tokens came "
    "in random order. Certainty: mean softmax of the chosen unit."
)


def statistics(layers: Sequence[Mapping[str, Any]]) -> str:
    """A table with one row per layer."""
    rows = [
        (
            str(i), f"{x['units']:,}", f"{x['dead']:,}", f"{x['effective_units']:.1f}",
            units.percent(x["largest_share"]), f"{x['variation']:.2f}", f"{x['chance_variation']:.2f}",
            units.percent(x["changed"]), units.percent(x["chance_changed"]), units.percent(x["certainty"]),
        )
        for i, x in enumerate(layers)
    ]  # fmt: skip
    return table(COLUMNS, rows)


def load(relative: Sequence[np.ndarray]) -> str:
    """Usage relative to a uniform one, units in order, one line per layer; units never used fall off the log scale."""
    with style.picture("controller-load") as p:
        ax = p.axes
        for i, usage in enumerate(relative):
            ordered = np.sort(usage, axis=None)[::-1]
            ordered = ordered[ordered > 0]
            share = 100 * np.arange(1, len(ordered) + 1) / usage.size
            ax.plot(share, ordered, color=_shade(i, len(relative)), linewidth=1.8, label=f"layer {i}")
        ax.axhline(1, color=style.MUTED, linewidth=1, linestyle=(0, (4, 4)))
        ax.set_yscale("log")
        ax.set_xlim(0, 100)
        ax.set_xlabel("units, most used first, %")
        ax.set_ylabel("usage × N")
        if len(relative) <= 12:
            ax.legend(ncols=2)
    return p.svg


def change(changed: Sequence[float], chance: Sequence[float]) -> str:
    """Bars per layer with a mark for what chance would give."""
    with style.picture("controller-change") as p:
        ax = p.axes
        layers = range(len(changed))
        ax.bar(layers, [100 * x for x in changed], 0.62, color=style.ACCENT)
        ax.hlines([100 * x for x in chance], [i - 0.4 for i in layers], [i + 0.4 for i in layers], color=style.INK)
        ax.set_xlabel("layer")
        ax.set_ylabel("%")
        ax.set_ylim(0, 105)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="x", visible=False)
    return p.svg


def usage_map(name: str, share: np.ndarray) -> str:
    """Usage ``[d_ff/N, N]`` as an image, units of a block in order of use."""
    ordered = np.sort(share[:MAP_BLOCKS], axis=1)[:, ::-1]
    with style.picture(name, 6.4, 2.6) as p:
        _image(p.axes, np.sqrt(ordered).T, "block", "unit, by use", 1.0, "viridis")
    return p.svg


def timeline(name: str, shown: Sequence[Sequence[int]], text: Sequence[str]) -> str:
    """Choices ``[T][d_ff/N]`` of the tokens ``text``, from top to bottom."""
    image = np.array(shown)[:, :MAP_BLOCKS]
    with style.picture(name, 6.4, 4.6) as p:
        _image(p.axes, image, "block", "", max(1, int(image.max())), "turbo")
        words = [repr(word)[1:-1].replace(" ", "·") for word in text]
        p.axes.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
    return p.svg


def mean(layers: Sequence[Mapping[str, Any]], key: str) -> float:
    """Over layers."""
    return float(np.mean([layer[key] for layer in layers]))


def _image(ax: style.Axes, values: np.ndarray, across: str, down: str, top: float, colors: str) -> None:
    ax.imshow(values, aspect="auto", vmin=0, vmax=top, cmap=colors, interpolation="nearest")
    ax.set_xlabel(across)
    ax.set_ylabel(down)
    ax.grid(visible=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _shade(index: int, count: int) -> str:
    """Ramp colours, the first layer pale."""
    return style.RAMP[2 + round(index * (len(style.RAMP) - 3) / max(count - 1, 1))]
