"""Activation landscapes: |x| over tokens and channels as surfaces, before and after each transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tulle.report import style, units


def surfaces(name: str, stages: Sequence[Mapping[str, Any]], columns: int = 3) -> str:
    """One surface per stage (``name``, ``picture``, ``peak``, ``rounding_error``, ``output_error``), each on a height
    scale of its own."""
    rows = -(-len(stages) // columns)
    with style.picture(name, 13.2, 3.7 * rows, (rows, columns), "3d") as p:
        p.figure.set_layout_engine("constrained", w_pad=0.0, h_pad=0.02, wspace=0.0, hspace=0.03)
        for ax, stage in zip(p.panels, stages, strict=False):
            _surface(ax, stage)
        for ax in p.panels[len(stages) :]:
            ax.set_axis_off()
    return p.svg


def channel_profile(name: str, absmax: Sequence[float], median: Sequence[float]) -> str:
    """Maximum and median |x| of each channel, in order."""
    with style.picture(name, 13.2, 2.0) as p:
        ax = p.axes
        positions = range(len(absmax))
        ax.vlines(positions, 0, absmax, color=style.ACCENT, linewidth=max(0.4, min(3.0, 700 / len(absmax))))
        ax.plot(positions, median, color=style.ROLES["o"], linewidth=1.2)
        ax.set_xlim(-1, len(absmax))
        ax.set_ylim(0, max(absmax) * 1.08 or 1)
        ax.set_xlabel("channel")
        ax.set_ylabel("|x|")
        ax.grid(axis="x", visible=False)
    return p.svg


def _surface(ax: Any, stage: Mapping[str, Any]) -> None:
    height = np.asarray(stage["picture"])
    tokens, channels = height.shape
    x, y = np.meshgrid(np.arange(channels), np.arange(tokens))
    ax.plot_surface(
        x, y, height, cmap="viridis", rcount=tokens, ccount=channels, linewidth=0, antialiased=False, rasterized=True
    )
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(style.MUTED)
        axis._axinfo["grid"].update(color=style.GRID, linewidth=0.5)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_zlim(0, max(float(height.max()), 1e-9))
    ax.zaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("channel", labelpad=-12)
    ax.set_ylabel("token", labelpad=-12)
    ax.view_init(elev=24, azim=-58)
    ax.set_box_aspect((1.5, 1.0, 0.8), zoom=1.18)
    ax.set_title(
        f"{stage['name']}\nmax |x| {units.significant(stage['peak'], 3)} · "
        f"A4 {units.percent(stage['rounding_error'])} · W4A4 {units.percent(stage['output_error'])}",
        fontsize=10.5,
        pad=-4,
    )
