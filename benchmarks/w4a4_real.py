"""Weights, inputs and caches of 4 bits on a real model, beside weights alone at the same group size.

    python benchmarks/w4a4_real.py --model FOLDER --calibration FILE --text FILE [--samples 32] [--length 1024]
        [--methods …] [--group-size auto-64]

One footing: weights in groups, asymmetric, by GPTQ (DuQuant also as published, rounded to nearest); inputs per token,
asymmetric, 4 bits; keys and values per token and head, 4 bits; embedding and head as they are. Everything that is
learned sees the same calibration tokens. Perplexity of the first ``--bytes`` of the text in windows of ``--window``
tokens, by the simulated model in float32. Finished cells of the JSON are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, beginning, import_methods  # noqa: E402

CLIP = 0.9
"""Of inputs, as QuaRot and DuQuant have it."""


def recipes(group_size: str, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Method → steps."""
    inputs = {"bits": 4, "symmetric": False}
    weights = inputs | {"group_size": group_size}
    plain, clipped, cache = {"activations": inputs}, {"activations": inputs | {"clip": CLIP}}, {"kv_cache": {"bits": 4}}
    gptq, rtn = {"gptq": weights}, {"round_to_nearest": weights}
    learned = weights | {"epochs": epochs}
    spin = inputs | {"input_bits": 4}
    smooth = {"smoothquant": {"alpha": 0.6}}
    rms = {"smoothquant": {"alpha": 0.5, "size": "rms"}}
    return {
        "W4": [gptq],
        "GPTQ": [plain, cache, gptq],
        "SmoothQuant": [{"smoothquant": {"alpha": 0.5}}, plain, cache, gptq],
        "QuaRot": [{"quarot": {}}, clipped, cache, gptq],
        "SpinQuant": [{"spinquant": spin}, {"quarot": {"residual": False}}, clipped, cache, gptq],
        "DuQuant, to nearest": [smooth, {"duquant": {}}, clipped, cache, rtn],
        "DuQuant": [smooth, {"duquant": {}}, clipped, cache, gptq],
        "FlatQuant": [plain, cache, {"flatquant": learned}, gptq],
        "Tulle's w4a4": [
            rms, {"perq": {}}, clipped, cache, {"affinequant": learned | {"alpha": 1.0}},
            {"gptq": weights | {"clip_search": 0}},
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--methods", nargs="*", choices=list(recipes("auto-64", 1)), default=list(recipes("auto-64", 1))
    )
    parser.add_argument("--group-size", default="auto-64")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--bytes", type=int, default=120_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/w4a4_real.json")
    options = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from tulle import machine
    from tulle.compression.job import compress
    from tulle.compression.recipe import read_recipe
    from tulle.evaluate import Protocol, evaluate_text
    from tulle.evaluate.loading import load_model

    import_methods()
    chosen = recipes(options.group_size, options.epochs)
    for name in options.methods:  # a wrong one is better known before hours of others
        read_recipe({"name": "w4a4", "steps": chosen[name]})
    machine.keep_freed_memory()
    text, protocol = beginning(options.text, options.bytes), Protocol(options.window)
    settings = {key: getattr(options, key) for key in ("group_size", "samples", "length", "epochs", "bytes", "window")}
    cells = Cells(options.out, machine=machine.describe(), settings=settings, model=options.model.name)

    def perplexity(folder: Path) -> float:
        return float(evaluate_text(*load_model(folder), text, protocol)["perplexity"])

    def made(steps: list[dict[str, Any]]) -> dict[str, float]:
        calibration = {"samples": options.samples, "length": options.length}
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            recipe = {"name": "w4a4", "calibration": calibration, "steps": steps}
            report = compress(options.model, recipe, Path(folder) / "m", calibration=[options.calibration])
            seconds = time.perf_counter() - begun
            return {
                "perplexity": perplexity(Path(folder) / "m"), "seconds": seconds,
                "peak_memory_bytes": report["peak_memory_bytes"],
            }  # fmt: skip

    dense = cells.make("dense", partial(perplexity, options.model))
    for name in options.methods:
        found = cells.make(name, partial(made, chosen[name]))
        Console().print(f"{name}: {found['perplexity']:.2f}, {found['seconds']:.0f} s")
    table = Table("", "perplexity", "beside W4", "seconds", title=f"dense {dense:.2f}")
    for name, found in cells.all.items():
        if name != "dense":
            share = found["perplexity"] / cells.all["W4"]["perplexity"] if "W4" in cells.all else float("nan")
            table.add_row(name, f"{found['perplexity']:.2f}", f"{share:.3f}", f"{found['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
