"""Quality per byte: a model compressed into given sizes, beside GGUF files of the same model.

    python benchmarks/quality_per_byte.py --model FOLDER --calibration FILE --text FILE [--sizes 50MB 60MB 75MB]
        [--gguf FILE ...] [--samples 128] [--length 2048] [--bytes 120000] [--window 1024]

Every size is ``allocate_bits`` and ``gptq`` on all linears, the embedding and the head. Everything is scored by one
evaluation, on the engine: the first ``--bytes`` of the text in windows of ``--window`` tokens. A GGUF file's types are
dequantised exactly. Sizes are those of the files with weights; a GGUF file holds its tokenizer too.

What is in build/quality is not made again; a killed run goes on. The costs of grids are measured once for all sizes:
the seconds of the first size hold that, those of the others do not. Prints a table, writes
results/quality_per_byte.json and, with ``--picture FILE``, the picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from cells import beginning, weight_bytes  # noqa: E402
from tulle import machine  # noqa: E402
from tulle.compression.job import compress  # noqa: E402
from tulle.evaluate import Protocol, evaluate_text  # noqa: E402
from tulle.evaluate.engine import load_engine  # noqa: E402
from tulle.text.reading import Text  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "quality_per_byte.json"
BUILD = Path("build/quality")
TARGETS = ["qkv", "o", "gate_up", "down", "embedding", "head"]


def recipe(size: str, groups: list[str], samples: int, length: int) -> dict[str, Any]:
    return {
        "name": size,
        "calibration": {"samples": samples, "length": length},
        "steps": [
            {"allocate_bits": {"size": size, "group_sizes": groups, "targets": TARGETS}},
            {"gptq": {"targets": TARGETS}},
        ],
    }


def scored(model: Path, text: Text, protocol: Protocol) -> float:
    loaded, tokenizer = load_engine(model, head="as stored")
    return float(evaluate_text(loaded, tokenizer, text, protocol)["perplexity"])


def draw(rows: list[dict[str, Any]], dense: float, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for kind, marker, colour in (("GGUF", "s", "#8a8a8a"), ("Tulle", "o", "#0b6e4f")):
        points = sorted((row["bytes"] / 1e6, row["perplexity"], row["name"]) for row in rows if row["kind"] == kind)
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], marker=marker, color=colour, label=kind,
            linestyle="-" if kind == "Tulle" else "none",
        )  # fmt: skip
        for size, perplexity, name in points:
            if kind == "GGUF":
                axes.annotate(name, (size, perplexity), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense, 16 bits")
    axes.set_xlabel("file, MB")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", default=["50MB", "60MB", "75MB", "91MB", "105MB", "112MB", "130MB"])
    parser.add_argument("--groups", nargs="*", default=["auto-32", "auto-64", "auto"])
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bytes", type=int, default=120_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    machine.keep_freed_memory()
    text, protocol = beginning(options.text, options.bytes), Protocol(options.window)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"dense": scored(options.model, text, protocol), "machine": machine.describe()}
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in found.get("rows", ())}
    for file in options.gguf:
        name = file.stem.rpartition("-")[2]
        rows[name] = {"kind": "GGUF", "name": name, "bytes": weight_bytes(file)}
        rows[name]["perplexity"] = scored(file, text, protocol)
    BUILD.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        output = BUILD / size
        report = compress(
            options.model, recipe(size, options.groups, options.samples, options.length), output,
            calibration=[options.calibration], resume=True, costs=BUILD / "costs",
        )  # fmt: skip
        rows[size] = {
            "kind": "Tulle", "name": size, "bytes": weight_bytes(output), "tensors": report["totals"]["packed_bytes"],
            "perplexity": scored(output, text, protocol), "seconds": report["seconds"]["total"],
            "peak_memory_bytes": report["peak_memory_bytes"], "calibration_tokens": report["calibration"]["tokens"],
        }  # fmt: skip
        found["rows"] = sorted(rows.values(), key=lambda row: row["bytes"])
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    found["rows"] = sorted(rows.values(), key=lambda row: row["bytes"])
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"perplexity of {options.model.name}, dense {found['dense']:.2f}")
    for column in ("", "file, MB", "perplexity", "seconds"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        table.add_row(f"{row['kind']} {row['name']}", f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f}", seconds)
    Console().print(table)
    if options.picture:
        draw(found["rows"], found["dense"], options.picture)


if __name__ == "__main__":
    main()
