"""Pictures of masks: where a linear keeps its weights (:mod:`tulle.core.mask_structure`).

Written as SVG by hand: thousands of cells, which take a tenth of the bytes that matplotlib writes.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from tulle.report import style, units

STEPS = len(style.RAMP)
LEAST_SPAN = 20
"""Percents that the ramp spans at least, so that chance is not drawn as structure."""

# Units of the picture: the matrix and what stands to the right of it.
WIDTH, HEIGHT, GAP, SIDE = 192, 96, 8, 74


def span(masks: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Ends of the ramp in whole percents: the kept shares of the tiles of all masks, but for the extreme hundredths,
    widened to a readable span."""
    tiles = np.concatenate([_tiles(mask).ravel() for mask in masks])
    low, high = (int(np.quantile(tiles, q, method="nearest")) for q in (0.01, 0.99))
    if high - low < LEAST_SPAN:
        low = min(max((low + high - LEAST_SPAN) // 2, 0), 100 - LEAST_SPAN)
        high = low + LEAST_SPAN
    return low, high


def key(low: int, high: int) -> str:
    """The ramp with its ends in percents, as HTML."""
    cells = "".join(f'<path stroke="var(--ramp-{i})" d="M{i} .5h1"/>' for i in range(STEPS))
    # Beyond the ends are extreme tiles, unless the ends are those of the scale.
    least, most = "at most " * (low > 0), "at least " * (high < 100)
    return (
        f'<div class="key"><span>{least}{low} %</span><svg viewBox="0 0 {STEPS} 1" preserveAspectRatio="none" '
        f'height="12" shape-rendering="crispEdges" role="img" aria-label="pale to strong">{cells}</svg>'
        f"<span>{most}{high} % kept</span></div>"
    )


def even(mask: Mapping[str, Any]) -> bool:
    """Whether all tiles and all rows keep the same share, as those of an N:M mask do."""
    return bool(np.ptp(_tiles(mask)) <= 1 and np.ptp(_marginal(mask, "rows", 0)) <= 1)


def picture(name: str, mask: Mapping[str, Any], low: float, high: float) -> str:
    """One mask: tiles shaded from ``low`` to ``high`` percents kept, single rows beside and single columns below them,
    the top left corner weight by weight, and how many weights are kept in each stripe. Tiles and rows that are all
    alike (:func:`even`) take one line."""
    tiles, rows, columns = _tiles(mask), _marginal(mask, "rows", 0), _marginal(mask, "columns", 1)
    steps = np.array([[style.ramp_index(v, low, high) for v in row] for row in tiles.tolist()])
    corner = _corner(mask)
    height, width = mask["tile"]
    right = WIDTH + GAP
    if even(mask):
        below = 30
        parts = [_text(0, 8, f"all rows and all tiles of {height} × {width} weights: {tiles.flat[0]} %")]
    else:
        below = HEIGHT + 30
        parts = [
            _text(0, 8, f"tiles of {height} × {width} weights"),
            _text(right, 8, "single rows"),
            _cells(steps, 0, 13),
            _bands(rows, right, 13, SIDE - 2, HEIGHT, False),
            _text(right, HEIGHT + 22, "0"),
            _text(right + SIDE - 2, HEIGHT + 22, "100 %", "end"),
        ]
    last = below + 56
    parts += [
        _text(0, below - 4, "single columns"),
        _bands(columns, 0, below, WIDTH, 36, True),
        _text(right - 4, below + 8, "100 %"),
        _text(right - 4, below + 36, "0"),
        _text(0, last - 5, f"first {corner.shape[0]} × {corner.shape[1]} weights, strong: kept"),
        _text(right, last - 5, f"kept of every {mask['stripe']}"),
        _cells(np.where(corner, STEPS - 2, 0), 0, last),
        _bars(mask["kept_in_stripe"], right, last),
    ]
    return (
        f'<svg viewBox="0 0 {right + SIDE} {last + HEIGHT + 1}" role="img" aria-label="{escape(describe(name, mask))}">'
        f"{''.join(parts)}</svg>"
    )


def describe(name: str, mask: Mapping[str, Any]) -> str:
    """The picture in words."""
    tiles, rows, columns = _tiles(mask), _marginal(mask, "rows", 0), _marginal(mask, "columns", 1)
    stripes = ", ".join(f"{units.percent(x)} keep {k}" for k, x in enumerate(mask["kept_in_stripe"]) if x)
    return (
        f"{name}: tiles keep {tiles.min()} % to {tiles.max()} %, single rows {rows[0].min()} % to {rows[2].max()} %, "
        f"single columns {columns[0].min()} % to {columns[2].max()} %{emptiness(mask, '; ')}. Of every "
        f"{mask['stripe']} weights of a row: {stripes}."
    )


def emptiness(mask: Mapping[str, Any], before: str = "") -> str:
    """``3 rows and 1 column empty, 5 columns nearly``, or "" where none is."""

    def counted(counts: Sequence[int]) -> str:
        words = [f"{n:,} {word}{'s' * (n != 1)}" for n, word in zip(counts, ("row", "column"), strict=True) if n]
        return " and ".join(words)

    empty = counted(mask["empty"])
    nearly = counted([n - e for n, e in zip(mask["nearly_empty"], mask["empty"], strict=True)])
    parts = [f"{empty} empty"] * bool(empty) + [f"{nearly} nearly empty"] * bool(nearly)
    return before + ", ".join(parts) if parts else ""


def _cells(steps: np.ndarray, x: float, y: float) -> str:
    """Cells ``[R, C]`` of the ramp's steps, one path per step, equal neighbours as one stroke."""
    rows, columns = steps.shape
    drawn: dict[int, list[str]] = {}
    for i, row in enumerate(steps.tolist()):
        begin = 0
        for j in range(1, columns + 1):
            if j == columns or row[j] != row[begin]:
                drawn.setdefault(row[begin], []).append(f"M{begin} {i}h{j - begin}")
                begin = j
    scale = f"{WIDTH / columns:.6g} {HEIGHT / rows:.6g}"
    paths = "".join(f'<path stroke="var(--ramp-{step})" d="{"".join(d)}"/>' for step, d in sorted(drawn.items()))
    return (
        f'<g transform="translate({x:g} {y + HEIGHT / rows / 2:.6g}) scale({scale})" shape-rendering="crispEdges">'
        f"{paths}</g>"
    )


def _bands(spread: np.ndarray, x: float, y: float, width: float, height: float, upright: bool) -> str:
    """Least to greatest ``[3, n]`` percents as a pale band, the mean as a line; ``upright``: 100 % is at the top."""
    length, across = (width, height) if upright else (height, width)
    step = length / spread.shape[1]

    def point(along: float, percent: float) -> str:
        a, b = along * step, across * percent / 100
        return f"{x + a:.5g} {y + across - b:.5g}" if upright else f"{x + b:.5g} {y + a:.5g}"

    lines = "".join(f"M{point(0, p)}L{point(spread.shape[1], p)}" for p in (0, 50, 100))
    band, mean = [], []
    for i, (low, middle, high) in enumerate(spread.T.tolist()):
        band.append(f"M{point(i, low)}L{point(i, high)}L{point(i + 1, high)}L{point(i + 1, low)}z")
        mean.append(f"{'L' if i else 'M'}{point(i, middle)}L{point(i + 1, middle)}")
    return (
        f'<path d="{lines}" stroke="var(--grid)" stroke-width=".8"/>'
        f'<path d="{"".join(band)}" fill="var(--dense)" fill-opacity=".55"/>'
        f'<path d="{"".join(mean)}" fill="none" stroke="var(--accent)" stroke-width="1.2"/>'
    )


def _bars(shares: Sequence[float], x: float, y: float) -> str:
    """One bar per number of kept weights, from none at the top to all."""
    step = HEIGHT / len(shares)
    # Wide stripes: what does not fit is left to the titles.
    every = -(-len(shares) // 9)
    longest = max(*shares, 1e-9)
    parts = []
    for kept, share in enumerate(shares):
        middle = y + (kept + 0.5) * step
        length = 30 * share / longest
        bar = (
            f'<path d="M{x + 11:g} {middle:.5g}h{max(length, 0.5):.4g}" stroke="var(--accent)" '
            f'stroke-width="{0.72 * step:.4g}"/>'
        )
        parts.append(f"<g><title>{units.percent(share)} of the stripes keep {kept}</title>{bar}</g>")
        if kept % every == 0:
            parts.append(_text(x + 8, middle + 3, str(kept), "end"))
        if every == 1 or share == longest:
            parts.append(_text(x + 14 + length, middle + 3, f"{100 * share:.0f} %"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.5g}" y="{y:.5g}" font-size="8.5" fill="var(--muted)" text-anchor="{anchor}">{text}</text>'


def _tiles(mask: Mapping[str, Any]) -> np.ndarray:
    return _bytes(mask["tiles"]).reshape(mask["grid"])


def _marginal(mask: Mapping[str, Any], name: str, axis: int) -> np.ndarray:
    return _bytes(mask[name]).reshape(3, mask["grid"][axis])


def _corner(mask: Mapping[str, Any]) -> np.ndarray:
    rows, columns = mask["corner_shape"]
    return np.unpackbits(_bytes(mask["corner"]), count=rows * columns).reshape(rows, columns).astype(bool)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
