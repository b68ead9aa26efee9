"""What the linear algebra of the layer-wise methods costs on a whole model, plain torch beside the compiled search.

    python benchmarks/linear_algebra.py [--model FOLDER] [--threads 2] [--repeats 5] [--output FILE]

Times the steps of GPTQ (4 bits) and SparseGPT (50 %, and 50 % with 4 bits) on the seven linears of one block of
SmolLM2-135M's shapes, plain and compiled in turn, and multiplies the medians by its 30 blocks. With ``--model`` the
weights are those of a block in the middle of that checkpoint, else normal. Activations are normal numbers with a
spectrum that falls as 1/sqrt(k), so that channels are correlated, and some wide channels.

``seconds`` is wall time; ``cpu_seconds`` the processor time of all threads, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulle.core import compiled
from tulle.core.descent import descend, objective
from tulle.core.grid import Grid, Quantised, find_steps
from tulle.core.hessian import Hessian
from tulle.core.masks import Pattern
from tulle.methods.contract import LinearState, Statistics
from tulle.methods.prune.sparsegpt import sparsegpt
from tulle.methods.quantize.gptq import GPTQ, gptq

BLOCKS = 30
INPUTS = {"attn": 576, "o": 576, "mlp": 576, "down": 1536}
LINEARS = {
    "self_attn.q_proj": (576, "attn"),
    "self_attn.k_proj": (192, "attn"),
    "self_attn.v_proj": (192, "attn"),
    "self_attn.o_proj": (576, "o"),
    "mlp.gate_proj": (1536, "mlp"),
    "mlp.up_proj": (1536, "mlp"),
    "mlp.down_proj": (576, "down"),
}
SETTINGS = {"g64": Grid(4, 64), "g32 asymmetric": Grid(4, 32, False)}
TOKENS = 8192


def activations(channels: int, generator: torch.Generator) -> Tensor:
    """X ``[TOKENS, channels]``."""
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    x = torch.randn(TOKENS, channels, generator=generator) * torch.arange(1, channels + 1).rsqrt() @ basis
    return x * torch.exp(torch.randn(channels, generator=generator))


def weights(model: Path | None, generator: torch.Generator) -> dict[str, Tensor]:
    if model is None:
        return {
            name: torch.randn(rows, INPUTS[source], generator=generator) * 0.05
            for name, (rows, source) in LINEARS.items()
        }
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(f"model.layers.{BLOCKS // 2}.{name}.weight").float() for name in LINEARS}


@contextmanager
def plain() -> Iterator[None]:
    fits, compiled.fits = compiled.fits, lambda *_: False
    try:
        yield
    finally:
        compiled.fits = fits


class Clock:
    """Sums of one run, by step."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    def __call__(self, step: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.wall[step] += time.perf_counter() - wall
        self.cpu[step] += time.process_time() - cpu
        return result


def quantise(clock: Clock, linears: dict[str, Tensor], hessians: dict[str, Tensor], grid: Grid, fast: bool) -> float:
    """One block with GPTQ; the sum of its objectives."""
    held = {key: Hessian(matrix, TOKENS) for key, matrix in hessians.items()}
    total = 0.0
    for name, w in linears.items():
        h = held[LINEARS[name][1]]
        factor = clock("factor", lambda: h.factor(0.01, True))  # noqa: B023
        if not fast:
            clock("factor", lambda: factor.upper)  # noqa: B023
        scale, zero = clock("clip search", lambda: find_steps(w, grid, h.matrix.diagonal(), 20))  # noqa: B023
        q = clock("sweep", lambda: gptq(w, factor, grid, scale, zero, None, 32))  # noqa: B023
        damped = clock("damped", lambda: h.damped(factor.damping))  # noqa: B023
        q = clock("descent", lambda: descend(w, q, damped, None, 4))  # noqa: B023
        found = clock("dequantise", q.dequantise)
        total += float(objective(w, found, damped).sum())
    return total


def whole(clock: Clock, linears: dict[str, Tensor], hessians: dict[str, Tensor], grid: Grid) -> None:
    """One block through ``GPTQ.apply_linear``."""
    held = {key: Hessian(matrix, TOKENS) for key, matrix in hessians.items()}
    method = GPTQ(grid.bits, grid.group_size, grid.symmetric)
    for name, w in linears.items():
        state = LinearState(name, w.clone(), w)
        h = held[LINEARS[name][1]]
        statistics_ = Statistics(TOKENS, h, h.matrix.diagonal(), h.matrix.diagonal())
        clock("apply_linear", lambda: method.apply_linear(state, statistics_))  # noqa: B023


def prune(clock: Clock, linears: dict[str, Tensor], hessians: dict[str, Tensor], fast: bool) -> float:
    """SparseGPT's sweeps without the refit: 50 %, 2:4, and 50 % with 4 bits g64."""
    held = {key: Hessian(matrix, TOKENS) for key, matrix in hessians.items()}
    total = 0.0
    for name, w in linears.items():
        h = held[LINEARS[name][1]]
        factor = clock("factor and inverse", lambda: h.factor(0.01))  # noqa: B023
        clock("factor and inverse", lambda: factor.upper)  # noqa: B023
        for label, sparsity, pattern, grid in (
            ("50 %", 0.5, None, None),
            ("2:4", None, Pattern(2, 4), None),
            ("50 %, 4 bits", 0.5, None, Grid(4, 64)),
        ):
            q = None
            if grid is not None:
                q = Quantised(grid, torch.zeros_like(w, dtype=torch.int16), *find_steps(w, grid))
            found, _ = clock(
                f"sweep {label}",
                lambda: sparsegpt(w, factor, sparsity=sparsity, pattern=pattern, quantised=q),  # noqa: B023
            )
            total += float(objective(w, found, h.matrix).sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linear_algebra.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    linears = weights(arguments.model, generator)
    hessians = {}
    for key, channels in INPUTS.items():
        h = Hessian.zeros(channels)
        h.add(activations(channels, generator))
        hessians[key] = h.matrix

    runs: dict[str, dict[str, list[Clock]]] = defaultdict(lambda: defaultdict(list))
    totals: dict[str, dict[str, float]] = defaultdict(dict)
    for _ in range(arguments.repeats):
        for way in ("plain", "compiled"):
            with plain() if way == "plain" else contextmanager(lambda: iter([None]))():  # type: ignore[arg-type]
                for label, grid in SETTINGS.items():
                    clock = Clock()
                    totals[f"gptq {label}"][way] = quantise(clock, linears, hessians, grid, way == "compiled")
                    if way == "compiled":
                        whole(clock, linears, hessians, grid)
                    runs[f"gptq {label}"][way].append(clock)
                clock = Clock()
                totals["sparsegpt"][way] = prune(clock, linears, hessians, way == "compiled")
                runs["sparsegpt"][way].append(clock)

    result: dict[str, Any] = {
        "blocks": BLOCKS,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "load": os.getloadavg()[0],
        "steps": {},
        "objective, compiled over plain": {run: of["compiled"] / of["plain"] for run, of in totals.items()},
    }
    for run, ways in runs.items():
        steps = result["steps"][run] = {}
        for way, clocks in ways.items():
            for step in clocks[0].wall:
                steps.setdefault(step, {})[way] = {
                    "seconds": round(BLOCKS * statistics.median(c.wall[step] for c in clocks), 3),
                    "cpu_seconds": round(BLOCKS * statistics.median(c.cpu[step] for c in clocks), 3),
                }
        for step, of in steps.items():
            print(
                f"{run:22} {step:20}",
                *(f"{way} {t['seconds']:8.2f} s ({t['cpu_seconds']:.2f})" for way, t in of.items()),
            )
    print(result["objective, compiled over plain"])
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
