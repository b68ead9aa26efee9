"""Recovery on a real model: what training towards the dense model gives back.

    python benchmarks/recover.py --model FOLDER --training FILE ... --text FILE --tasks FILE ...
        [--cells sparse50-w4 ...] [--tokens 2000000] [--rate 0.0015] [--limit ROWS]

A cell is a recipe, made with ``recover`` and (``one-shot``) without it. Each is scored on the engine: perplexity of the
first ``--bytes`` of the text in windows of ``--window`` tokens, and accuracy on the tasks, as is the dense model.
``recovery`` is the mean accuracy over that of the dense model. The text of ``--training`` is what is calibrated on and
trained on, so keep it apart from ``--text`` and ``--tasks``.

What is in build/recover is not made again; a killed run goes on. Prints a table and writes results/recover.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import tulle  # noqa: E402
from cells import beginning, weight_bytes  # noqa: E402
from tulle import machine  # noqa: E402
from tulle.evaluate import Protocol, evaluate_task, evaluate_text  # noqa: E402
from tulle.evaluate.engine import load_engine  # noqa: E402
from tulle.text.reading import Text, read_text  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "recover.json"
BUILD = Path("build/recover")
FOUR = {"gptq": {"bits": 4, "group_size": "auto-64"}}
TABLE = {"gptq": {"bits": 6, "group_size": "auto-64", "symmetric": False, "targets": ["embedding", "head"]}}
TWO = {"gptq": {"bits": 2, "group_size": "auto-64", "symmetric": False, "scale_bits": 8}}
CELLS: dict[str, dict[str, Any]] = {
    "w4": {"steps": [FOUR, TABLE]},
    "sparse50-w4": {
        "steps": [{"allocate": {"sparsity": 0.5}}, {"alps": {"sparsity": 0.5, "growth": 0.1}}],
        "then": [FOUR, TABLE],
    },
    "2of4-w4": {"steps": [{"alps": {"pattern": "2:4"}}], "then": [FOUR, TABLE]},
    "inputs50-w4": {
        "steps": [{"activation_budget": {"share": 0.5}}, {"wina": {"share": 0.5}}],
        "then": [{"wina": {"share": 0.5}}, FOUR, TABLE],
    },
    "w2": {"steps": [TWO, TABLE]},
}
"""``then``: steps after recovery, where the weights that are trained have no codes yet."""
SAMPLES, LENGTH = 64, 1024


def recipe(cell: str, recover: dict[str, Any] | None) -> dict[str, Any]:
    found = {"name": cell, "calibration": {"samples": SAMPLES, "length": LENGTH}} | CELLS[cell]
    if recover is None:
        then = found.pop("then", [])  # where inputs are selected again
        return found | {"steps": found["steps"] + [step for step in then if step not in found["steps"]]}
    return found | {"recover": recover}


def scored(model: Path, text: Text, protocol: Protocol, tasks: list[Path], limit: int | None) -> dict[str, Any]:
    """Perplexity and accuracies; what an earlier run has scored is kept in the folder."""
    kept = BUILD / f"{model.name}.scores.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    # Of many tokens at once, tiles are twice as fast as weights in the order of their inputs.
    loaded, tokenizer = load_engine(model, head="as stored", layout="dense")
    if "perplexity" not in found:
        found["perplexity"] = float(evaluate_text(loaded, tokenizer, text, protocol)["perplexity"])
    for file in tasks:
        key = file.stem if limit is None else f"{file.stem}:{limit}"
        if key not in found:
            found[key] = evaluate_task(loaded, tokenizer, file, limit=limit)
            kept.write_text(json.dumps(found, indent=1))
    keys = {file.stem: file.stem if limit is None else f"{file.stem}:{limit}" for file in tasks}
    row = {"perplexity": found["perplexity"], "bytes": weight_bytes(model)}
    row["accuracy"] = {task: found[key]["accuracy"] for task, key in keys.items()}
    return row | {"mean_accuracy": sum(row["accuracy"].values()) / len(keys)} if keys else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--training", nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, nargs="*", default=[])
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--without-one-shot", action="store_true")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--rate", type=float, default=0.0015)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cross-entropy", type=float, default=0.5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--bytes", type=int, default=120_000)
    parser.add_argument("--window", type=int, default=1024)
    options = parser.parse_args()
    machine.keep_freed_memory()
    text = beginning(options.text, options.bytes)
    scoring = (text, Protocol(options.window), options.tasks, options.limit)
    BUILD.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    found |= {"machine": machine.describe()}
    settings = {
        "tokens": options.tokens, "rate": options.rate, "batch": options.batch,
        "cross_entropy": options.cross_entropy,
    }  # fmt: skip
    for cell in options.cells:
        for recover in (None, settings):
            if recover is None and options.without_one_shot:
                continue
            output = BUILD / (cell if recover is None else f"{cell}-recovered")
            report = tulle.compress(
                options.model, recipe(cell, recover), output, calibration=read_text(options.training), resume=True,
            )  # fmt: skip
            row = scored(output, *scoring) | {
                "recovered": recover is not None, "seconds": report["seconds"]["total"],
                "peak_memory_bytes": report["peak_memory_bytes"],
            }  # fmt: skip
            if recover is not None:
                row["recover"] = report["recover"]
            found["rows"][output.name] = row
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    found["dense"] = scored(options.model, *scoring)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


def show(found: dict[str, Any]) -> None:
    dense = found["dense"]
    tasks = list(dense.get("accuracy", {}))
    table = Table(title="accuracy, %")
    for column in ("", "file, MB", "perplexity", *tasks, "mean", "recovery, %"):
        table.add_column(column, justify="right")
    for name, row in {"dense": dense, **found["rows"]}.items():
        cells = [f"{100 * row['accuracy'][task]:.1f}" if task in row.get("accuracy", {}) else "" for task in tasks]
        if "mean_accuracy" in row and "mean_accuracy" in dense:
            share = row["mean_accuracy"] / dense["mean_accuracy"]
            cells += [f"{100 * row['mean_accuracy']:.2f}", f"{100 * share:.1f}"]
        table.add_row(name, f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
