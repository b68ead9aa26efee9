"""Every way to prune without training, side by side: perplexity and mean layer error.

    python benchmarks/sparse.py --data DIR [--models …] [--shares 50 60 70 2:4 4:8] [--methods …]

Models and texts as in w4a4.py: tinystories-656K (256 calibration stories; protocol of peer_tinystories.py) and the
bundled reference model (32 modules). The rows go up a ladder: the published methods (each linear fitted to its own
output), then what is ours, one ingredient at a time:

- ``exact refit``: the kept weights by least squares, row by row, instead of SparseGPT's sweep;
- ``fitted to the dense stream``: the target is what the dense model gives on its own inputs, residual stream included;
- ``ALPS``: the mask by ADMM; ``swaps``: kept for pruned weights exchanged while that helps;
- ``permuted`` (N:M): channels in the order that retains most; ``allotted`` (shares): more of the budget where it costs
  less;
- ``reconstructed``: attention and MLP of a block trained against the dense block.

Last, the shipped recipes as they are.

Finished cells of the JSON are kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, import_methods  # noqa: E402
from w4a4 import MODELS, Bench  # noqa: E402

SHARES = ("50", "60", "70", "2:4", "4:8")
RECIPES = (
    "sparse50", "sparse60", "sparse70", "sparse70-reconstructed", "2of4", "2of4-permuted", "sparse50-w4", "sparse70-w4",
    "sparse70-w8a8",
)  # fmt: skip
SAMPLES = {"tinystories": 256, "reference": 32}


def recipes(share: str) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Method → (steps, calibration target)."""
    pattern = ":" in share
    p: dict[str, Any] = {"pattern": share} if pattern else {"sparsity": int(share) / 100}
    alps = p | {"growth": 0.1}  # the published schedule, three times faster than the default
    best = {"alps": alps}
    shaped = {"permute_channels": {"pattern": share}} if pattern else {"allocate": p}
    name = "permuted" if pattern else "allotted"
    ladder: dict[str, tuple[list[dict[str, Any]], str]] = {
        "magnitude": ([{"magnitude": p}], "layer"),
        "Wanda": ([{"wanda": p}], "layer"),
        "RIA": ([{"ria": p}], "layer"),
        "SparseGPT": ([{"sparsegpt": p | {"refit": False}}], "layer"),
        "SparseGPT, exact refit": ([{"sparsegpt": p}], "layer"),
        "SparseGPT, refit, fitted to the dense stream": ([{"sparsegpt": p}], "stream"),
        "ALPS": ([best], "layer"),
        "ALPS, dense stream": ([best], "stream"),
        "ALPS, dense stream, swaps": ([{"alps": alps | {"swaps": 1}}], "stream"),
        f"ALPS, dense stream, {name}": ([shaped, best], "stream"),
        f"ALPS, dense stream, {name}, reconstructed": ([shaped, best, {"reconstruct": {}}], "stream"),
        "SparseGPT, dense stream, reconstructed": ([{"sparsegpt": p}, {"reconstruct": {}}], "stream"),
    }
    if not pattern:
        ladder["OWL, SparseGPT, dense stream"] = ([{"owl": p}, {"sparsegpt": p}], "stream")
    return ladder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/tinystories-656K and text/tinystories_10k.txt")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shares", nargs="*", choices=SHARES, default=list(SHARES))
    parser.add_argument("--methods", nargs="*", help="by name; default: all")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sparse.json")
    arguments = parser.parse_args()
    if "tinystories" in arguments.models and not arguments.data:
        parser.error("--data is required for tinystories")

    import torch

    from tulle import machine
    from tulle.compression.recipe import load_recipe

    torch.set_num_threads(arguments.threads)
    import_methods()
    cells = Cells(arguments.out, machine=machine.describe() | {"threads": arguments.threads}, samples=SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            bench = Bench(name, arguments.data, Path(folder), SAMPLES[name])
            cells.make(f"{name}/dense", lambda bench=bench: {"perplexity": bench.perplexity(bench.model)})
            for share in arguments.shares:
                for method, (steps, target) in recipes(share).items():
                    if arguments.methods and method not in arguments.methods:
                        continue
                    key = f"{name}/{share}/{method}"
                    found = cells.make(key, partial(bench.run, bench.model, steps, target))
                    print(f"{key}: {found['perplexity']:.2f}, layer error {found['layer_error']:.4f}, "
                          f"{found['seconds']:.0f} s", flush=True)  # fmt: skip
            for recipe in arguments.recipes:
                steps, target = load_recipe(recipe).to_json()["steps"], load_recipe(recipe).calibration.target
                found = cells.make(f"{name}/recipe/{recipe}", partial(bench.run, bench.model, steps, target))
                print(f"{name}, {recipe}: {found['perplexity']:.2f}, {found['seconds']:.0f} s", flush=True)
    print_tables(cells.all)


def print_tables(cells: dict[str, Any]) -> None:
    """A table per model: perplexity (mean layer error)."""
    from rich.console import Console
    from rich.table import Table

    for name in MODELS:
        dense = cells.get(f"{name}/dense")
        if dense is None:
            continue
        table = Table("method", *SHARES, title=f"{name}, dense {dense['perplexity']:.2f}: perplexity (layer error)")
        for method in dict.fromkeys(m for share in SHARES for m in recipes(share)):
            found = [cells.get(f"{name}/{share}/{method}") for share in SHARES]
            table.add_row(
                method, *("" if c is None else f"{c['perplexity']:.2f} ({c['layer_error']:.3f})" for c in found)
            )
        Console(width=140).print(table)
        shipped = Table("recipe", "perplexity", title=f"{name}: shipped recipes")
        for recipe in RECIPES:
            if f"{name}/recipe/{recipe}" in cells:
                shipped.add_row(recipe, f"{cells[f'{name}/recipe/{recipe}']['perplexity']:.2f}")
        Console(width=140).print(shipped)


if __name__ == "__main__":
    main()
