"""Training speed with held masks: measured against theoretical speed-up, over sparsity, beside torch in float32.

    OMP_WAIT_POLICY=passive python benchmarks/sparse_training.py [--side 2048] [--tokens 512] [--threads 1 2]

One linear of ``side`` × ``side`` without bias, ``tokens`` tokens, random masks: ``nn.Linear`` against ``SparseLinear``,
forward alone; forward and both gradients; and these with AdamW (fused). Theory: 1 / (1 − sparsity). Every round times
the dense linear and all sparse ones once, in turn; reported are medians over rounds, and of the ratios within a round.
Times are of the wall clock with several threads, and of the processor with one, so that a neighbour on the machine
takes from neither. (Both are in the JSON.)

Passive waiting, because torch and the kernels have thread pools of their own, and one that spins takes a core from the
other.

``--device cuda``: forward of 2:4 (torch's semi-structured kernels, float16) beside dense, over tokens. Not run here: no
such machine was at hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
PARTS = ("forward", "forward and gradients", "step with AdamW")


def runs(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def forward() -> torch.Tensor:
        return module(x)

    def gradients() -> None:
        x.grad = None
        optimizer.zero_grad()
        module(x).backward(dy)

    def step() -> None:
        gradients()
        optimizer.step()

    return dict(zip(PARTS, (forward, gradients, step), strict=True))


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    wall, processor = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return {"wall_ms": wall, "processor_ms": processor}


def measure(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    from tulle.methods.train.sparse_linear import SparseLinear

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side, tokens = arguments.side, arguments.tokens
    dense = nn.Linear(side, side, bias=False)
    x, dy = torch.randn(tokens, side, requires_grad=True), torch.randn(tokens, side)
    candidates = {"dense": runs(dense, x, dy)}
    for sparsity in SPARSITIES:
        order = torch.randperm(side * side)
        mask = torch.zeros(side * side, dtype=torch.bool)
        mask[order[: round((1 - sparsity) * side * side)]] = True
        candidates[f"{sparsity:.2f}"] = runs(SparseLinear.from_linear(dense, mask.view(side, side)), x, dy)
    which = 1 if threads == 1 else 0
    rounds = [
        {part: {name: timed(found[part]) for name, found in candidates.items()} for part in PARTS}
        for _ in range(arguments.rounds + 1)
    ][1:]  # the first one warms up
    result: dict[str, Any] = {part: {} for part in PARTS}
    for part in PARTS:
        for name in candidates:
            result[part][name] = medians([once[part][name] for once in rounds])
            if name == "dense":
                continue
            speedup = statistics.median(once[part]["dense"][which] / once[part][name][which] for once in rounds)
            result[part][name] |= {"speedup": speedup, "of_theory": speedup * (1 - float(name))}
    dense_seconds = result["forward"]["dense"]["processor_ms" if threads == 1 else "wall_ms"] / 1e3
    result["dense_gflops"] = 2 * tokens * side * side / dense_seconds / 1e9
    return result


def semi_structured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed-up of the forward pass of a 2:4 linear on a GPU, by tokens."""
    from torch.sparse import to_sparse_semi_structured
    from torch.utils.benchmark import Timer

    weight = torch.randn(arguments.side, arguments.side, device="cuda", dtype=torch.float16)
    weight *= torch.tensor([1, 1, 0, 0], device="cuda").repeat(arguments.side // 4)
    sparse = to_sparse_semi_structured(weight)
    found = {}
    for tokens in (512, 2048, 8192, 32768):
        x = torch.randn(tokens, arguments.side, device="cuda", dtype=torch.float16)
        dense, pruned = (
            Timer("torch.nn.functional.linear(x, w)", globals={"torch": torch, "x": x, "w": w})
            .blocked_autorange()
            .median
            for w in (weight, sparse)
        )
        found[str(tokens)] = {"dense_ms": 1e3 * dense, "ms": 1e3 * pruned, "speedup": dense / pruned}
    return {"device": torch.cuda.get_device_name(), "forward": found}


def draw(content: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(content["threads"]), squeeze=False)[0]
    for axes, (threads, result) in zip(panels, content["threads"].items(), strict=True):
        axes.plot(SPARSITIES, [1 / (1 - s) for s in SPARSITIES], color="0.4", label="theory, 1 / (1 − s)")
        axes.plot(SPARSITIES, [0.8 / (1 - s) for s in SPARSITIES], color="0.7", linestyle=":", label="80 % of it")
        for part, color in zip(PARTS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            speedups = [result[part][f"{s:.2f}"]["speedup"] for s in SPARSITIES]
            axes.plot(SPARSITIES, speedups, color=color, marker="o", markersize=3, label=part)
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set_xlabel("sparsity")
        axes.set_ylabel("times as fast as dense torch, float32")
        axes.set_title(
            f"{threads} thread{'s' if threads != '1' else ''}, {content['side']}², {content['tokens']} tokens"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results/sparse_training.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs/sparse_training.png")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from tulle import machine

    if arguments.device == "cuda":
        print(json.dumps(semi_structured(arguments), indent=2))
        return
    content: dict[str, Any] = {
        "machine": machine.describe(), "side": arguments.side, "tokens": arguments.tokens, "rounds": arguments.rounds,
        "threads": {},
    }  # fmt: skip
    for threads in arguments.threads:
        content["threads"][str(threads)] = result = measure(arguments, threads)
        title = f"threads: {threads}; dense forward {result['dense_gflops']:.0f} GFLOP/s; speed-up and share of theory"
        table = Table("sparsity", *PARTS, title=title)
        for sparsity in SPARSITIES:
            cells = [result[part][f"{sparsity:.2f}"] for part in PARTS]
            table.add_row(f"{sparsity:.0%}", *[f"{c['speedup']:.2f}  {c['of_theory']:.0%}" for c in cells])
        Console(width=110).print(table)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    draw(content, arguments.picture)


if __name__ == "__main__":
    main()
