"""The page of ``tulle demo``: dense and recipes of every kind side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tulle.report import plots, units
from tulle.report.cells import DEMO_COLUMNS, row_cells
from tulle.report.inspection import describe
from tulle.report.page import chart, render, tile, write_page


def write_demo(found: Mapping[str, Any], file: str | Path) -> None:
    """Writes the page for the result of :func:`tulle.compression.demo.run_demo`."""
    write_page(Path(file), demo_page(found))


def demo_page(found: Mapping[str, Any]) -> str:
    """The page as HTML that needs no other file (each recipe's row links to its own report beside it)."""
    rows = found["rows"]
    cells = [row_cells(row, rows[0]) for row in rows]
    return render(
        "demo.html",
        title="Sparse and low-bit: the bundled model by shipped recipes",
        subtitle=describe(found["architecture"]),
        tiles=_tiles(found),
        picture=_speed_chart(found),
        notes=[
            {"text": text, "warning": warning}
            for text, warning in (
                (cache_note(found), False),
                (densified_note(found), False),
                (disturbed_note(found), True),
            )
            if text
        ],
        charts=[_size_chart(rows)],
        columns=[heading for heading, _ in DEMO_COLUMNS],
        rows=[
            {"name": row["name"], "cells": [row[key] for _, key in DEMO_COLUMNS[1:]], "description": row["description"]}
            for row in cells
        ],
        prompt=found["prompt"],
        samples=[(row["name"], row["sample"]) for row in rows],
        facts=_facts(found),
    )


def cache_note(found: Mapping[str, Any]) -> str:
    """What the speeds say of larger models: these weights may never leave the processor's cache."""
    cache, largest = found["machine"]["cache_bytes"], max(row["weight_bytes"] for row in found["rows"])
    reads = f"A token of the dense model reads {units.size(largest)}"
    beyond = (
        "Larger models are read from memory: there speed follows the bytes that a token reads, and sparsity pays. "
        "The engine's documentation has measurements of that."
    )
    if cache is None or largest > cache:
        return f"{reads}, which may be more than this processor's cache holds. {beyond}"
    return (
        f"{reads}, and this processor's cache holds {cache >> 20} MiB: every model here runs from the cache, where the "
        f"time goes into instructions and not into bytes. {beyond}"
    )


def densified_note(found: Mapping[str, Any]) -> str:
    """Which pruned models run with their zeros filled in; "" if none does."""
    names = [
        row["name"] for row in found["rows"] if row["sparsity"] > 0 and row["layout"] in ("dense", "dense columns")
    ]
    if not names:
        return ""
    return (
        f"Densified by the engine, because it measured that to be faster here: {', '.join(names)}. "
        "Their pruned weights are stored as zeros in memory, though not in the file."
    )


def disturbed_note(found: Mapping[str, Any]) -> str:
    """A warning where decoding was not equally fast in all rounds, else ""."""
    speed = found["speed"]
    if not speed["disturbed"]:
        return ""
    return (
        f"Speeds varied by {units.percent(round(speed['spread'], 2))} between rounds: something else was running. "
        "Repeat the demo on an idle machine before quoting them."
    )


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    dense, *compressed = found["rows"]
    smallest = min(compressed, key=lambda row: row["bytes"])
    fastest = max(compressed, key=lambda row: row["speedup"])
    nearest = min(compressed, key=lambda row: row["bits_per_byte"])
    speed = units.significant(dense["decode_tokens_per_s"], 3)
    return [
        tile("Dense", units.size(dense["bytes"]), f"{dense['bits_per_byte']:.3f} bits per byte, {speed} tokens/s"),
        tile("Smallest", units.size(smallest["bytes"]), f"{smallest['name']}, {_cost(smallest, dense)} bits per byte"),
        tile("Fastest", f"{fastest['speedup']:.2f}×", f"{fastest['name']}, {_cost(fastest, dense)} bits per byte"),
        tile("Nearest to dense", _cost(nearest, dense), f"bits per byte, {nearest['name']}"),
    ]


def _cost(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    return f"{round(row['bits_per_byte'] - dense['bits_per_byte'], 4) + 0.0:+.4f}"


def _speed_chart(found: Mapping[str, Any]) -> dict[str, Any]:
    rows, speed = found["rows"], found["speed"]
    points = [_point(row, row["decode_tokens_per_s"]) for row in rows]
    threads = f"{speed['threads']} thread{'s' * (speed['threads'] > 1)}"
    return chart(
        "Quality against speed",
        f"Measured on this machine with {threads} of Tulle's engine. Up and to the right is better. "
        "A marker's area is the size of the file; the dashed lines cross in the dense model.",
        plots.models("speed", points, "decode, tokens/s", "bits per byte (less is better)"),
        wide=True,
        text="Scatter plot of bits per byte against tokens per second; the figures are in the table below.",
    )


def _size_chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    points = [_point(row, row["bytes"] / 1e6) for row in rows]
    return chart(
        "Quality against size",
        "The whole model, embeddings included. Up and to the left is better.",
        plots.models("size", points, "size of the model, MB", "bits per byte (less is better)", 4.4),
        wide=True,
        text="Scatter plot of bits per byte against size; the figures are in the table above.",
    )


def _point(row: Mapping[str, Any], x: float) -> plots.Point:
    title = (
        f"{row['name']}: {units.size(row['bytes'])}, {row['bits_per_byte']:.4f} bits per byte, "
        f"{units.significant(row['decode_tokens_per_s'], 3)} tokens/s"
    )
    return plots.Point(row["name"], x, row["bits_per_byte"], row["bytes"], row["kind"], title)


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration, machine, dense, speed = found["calibration"], found["machine"], found["rows"][0], found["speed"]
    amount = f"{calibration['samples']} sequences, {calibration['tokens']:,} tokens"
    return [
        ("Calibration", f"{', '.join(calibration['source'])}: {amount}"),
        (
            "Quality",
            f"{found['protocol']}; {dense['tokens']:,} tokens, {dense['scored_bytes']:,} bytes scored, by the engine",
        ),
        (
            "Speed",
            f"{speed['tokens']} tokens decoded after a prompt of {speed['prompt']}, one sequence; all models in turn, "
            f"medians of {speed['rounds']} rounds, of which the middle half lies within "
            f"{units.percent(round(speed['spread'], 3))}",
        ),
        ("Time", f"{units.duration(found['seconds'])} for compressing, evaluating and timing"),
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"),
        ("Software", f"Python {machine['python']}, torch {machine['torch']}"),
    ]
