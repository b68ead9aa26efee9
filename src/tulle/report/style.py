"""Pictures in the page's own colours: matplotlib draws with placeholders that become CSS variables.

So one SVG is right in light and dark mode and in print, and its text is set in the page's font.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER, ACCENT, DENSE = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
CARD = "#010107"
"""What is behind a picture."""
ROLES = {
    "qkv": "#020101", "q_up": "#020105", "kv_up": "#020106", "o": "#020102", "gate_up": "#020103", "down": "#020104",
}  # fmt: skip


def of_role(role: str) -> str:
    """A role's colour; routers, which no step compresses, have the axes'."""
    return ROLES.get(role, MUTED)


KINDS = {"dense": "#050100", "low-bit": "#050101", "sparse": "#050102", "sparse and low-bit": "#050103"}
"""Kinds of models."""
RAMP = tuple(f"#03010{i}" for i in range(8))
"""Sequential: index 0 is the least."""
ON_RAMP = tuple(f"#04010{i}" for i in range(8))
"""Text on the ramp's colours."""

_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", ACCENT: "--accent", DENSE: "--dense",
    CARD: "--card",
    **{color: f"--role-{role.replace('_', '-')}" for role, color in ROLES.items()},
    **{color: f"--kind-{kind.replace(' ', '-')}" for kind, color in KINDS.items()},
    **{color: f"--ramp-{i}" for i, color in enumerate(RAMP)},
    **{color: f"--on-ramp-{i}" for i, color in enumerate(ON_RAMP)},
}  # fmt: skip

_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.labelsize": 9.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


class Picture:
    """A figure being drawn; ``svg`` is set when the ``with`` block ends."""

    def __init__(self, width: float, height: float, panels: tuple[int, int] = (1, 1), projection: str | None = None):
        self.figure = Figure(figsize=(width, height), layout="constrained")
        grid = self.figure.subplots(*panels, squeeze=False, subplot_kw={"projection": projection})
        self.panels: list[Axes] = list(grid.flat)
        self.axes = self.panels[0]
        self.svg = ""
        self.titles: dict[str, str] = {}

    def title(self, artist: Artist, text: str) -> None:
        """What a browser shows over ``artist``."""
        name = f"title-{len(self.titles)}"
        artist.set_gid(name)
        self.titles[name] = text


@contextmanager
def picture(
    name: str,
    width: float = 6.4,
    height: float = 3.0,
    panels: tuple[int, int] = (1, 1),
    projection: str | None = None,
) -> Iterator[Picture]:
    """``with picture("error") as p: p.axes.plot(...)``, then ``p.svg``. Inches; ``name`` salts the SVG's ids."""
    with rc_context({**_RC, "svg.hashsalt": name}):
        drawn = Picture(width, height, panels, projection)
        yield drawn
        buffer = io.StringIO()
        # dpi: of what is drawn as pixels inside the SVG.
        drawn.figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for gid, text in drawn.titles.items():
        # The id has done its work; the next picture of the page would repeat it.
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{escape(text)}</title>", 1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    drawn.svg = svg


def labelled(svg: str, text: str) -> str:
    """A picture with a text of its own, for a card that shows several."""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(text)}" ', 1)


def ramp_index(value: float, low: float, high: float) -> int:
    """The ramp's step for a value between ``low`` and ``high``."""
    if high <= low:
        return len(RAMP) // 2
    return min(len(RAMP) - 1, max(0, int((value - low) / (high - low) * len(RAMP))))
