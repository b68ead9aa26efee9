"""DuQuant's own ablations in small: block size, steps of the search, permutation, and each component alone.

    python benchmarks/duquant_ablation.py --data DIR [--models …] [--variant massive]

Models, texts and protocol of w4a4.py; W4A4, RTN weights (clip 0.8), activation clip 0.9, as in the paper. Every
case is run with several seeds, because the rotations are drawn at random: median and range.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, import_methods  # noqa: E402
from w4a4 import MODELS, VARIANTS, Bench  # noqa: E402

SMOOTH = {"smoothquant": {"alpha": 0.6}}
TAIL = [
    {"activations": {"bits": 4, "symmetric": False, "clip": 0.9}},
    {"round_to_nearest": {"bits": 4, "symmetric": False, "clip": 0.8}},
]


def cases() -> dict[str, list[dict[str, Any]]]:
    """Case → steps before the quantisers."""

    def duquant(smooth: bool = True, **settings: Any) -> list[dict[str, Any]]:
        return ([SMOOTH] if smooth else []) + [{"duquant": settings}]

    found: dict[str, list[dict[str, Any]]] = {
        "nothing": [],
        "smooth": [SMOOTH],
        "R₁": duquant(smooth=False, permutations=0),
        "smooth, R₁": duquant(permutations=0),
        "R₁·P·R₂": duquant(smooth=False),
        "smooth, R₁·P·R₂ (DuQuant)": duquant(),
        "DuQuant, P random": duquant(permutation="random"),
        "DuQuant, P none": duquant(permutation="none"),
        "DuQuant, two more P and R": duquant(permutations=2),
        "DuQuant, row index as in the public code": duquant(choose="row_index"),
        "smooth, block Hadamard 128": duquant(rotation="hadamard", permutations=0),
        "smooth, Hadamard·P·Hadamard": duquant(rotation="hadamard"),
        "smooth, P·Hadamard (PeRQ)": [SMOOTH, {"perq": {}}],
        "smooth, Hadamard over the width": [SMOOTH, {"perq": {"block": 0}}],
    }
    for block in (4, 8, 16, 32, 64, 128):
        found[f"block {block}"] = duquant(block=block)
    for steps in (1, 4, 16, 64, 256):
        found[f"N {steps}"] = duquant(steps=steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/tinystories-656K and text/tinystories_10k.txt")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["reference"])
    parser.add_argument("--variant", choices=VARIANTS, default="massive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/duquant_ablation.json")
    arguments = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.table import Table

    from tulle import machine

    torch.set_num_threads(arguments.threads)
    import_methods()
    cells = Cells(
        arguments.out,
        machine=machine.describe() | {"threads": arguments.threads},
        protocol=f"{arguments.samples} calibration sequences, {arguments.seeds} seeds; see w4a4.py",
    )

    def perplexities(bench: Bench, model: Path, steps: list[dict[str, Any]]) -> list[float]:
        return [bench.run(model, steps, "layer", seed)["perplexity"] for seed in range(arguments.seeds)]

    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            bench = Bench(name, arguments.data, Path(folder), arguments.samples)
            model = bench.variant(arguments.variant)
            cells.make(f"{name}/{arguments.variant}/FP", lambda bench=bench, model=model: [bench.perplexity(model)])
            for case, steps in cases().items():
                key = f"{name}/{arguments.variant}/{case}"
                found = cells.make(key, partial(perplexities, bench, model, [*steps, *TAIL]))
                print(key, [round(p, 2) for p in found], flush=True)
    for name in arguments.models:
        prefix = f"{name}/{arguments.variant}/"
        table = Table("case", "perplexity", "range", title=f"{name}, {arguments.variant} outliers, W4A4")
        for key, found in cells.all.items():
            if key.startswith(prefix):
                spread = f"{min(found):.2f}–{max(found):.2f}"
                table.add_row(key.removeprefix(prefix), f"{statistics.median(found):.2f}", spread)
        Console().print(table)


if __name__ == "__main__":
    main()
