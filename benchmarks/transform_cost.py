"""What online transforms cost in torch, beside the linears that they precede.

    python benchmarks/transform_cost.py [--width 4096 --ffn 11008]

Shapes of Llama-2-7B by default. Per group (q/k/v read one input, gate/up another): seconds of the transform over
seconds of the linears, float32, for 1, 16 and 512 tokens. Transform and linears run in turns; medians; the ratio is
the figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/transform_cost.json")
    arguments = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.table import Table

    from tulle import machine
    from tulle.core.hadamard import hadamard_block
    from tulle.core.rotation import random_orthogonal
    from tulle.core.transform import BlockMatrix, Hadamard, Kronecker, Permutation, Transform, run
    from tulle.methods.quantize.flatquant import factors

    torch.set_num_threads(arguments.threads)
    g = torch.Generator().manual_seed(0)
    d, f = arguments.width, arguments.ffn

    def chains(columns: int) -> dict[str, list[Transform]]:
        rotation = BlockMatrix(random_orthogonal(128, g))
        matrices = BlockMatrix(torch.stack([random_orthogonal(128, g) for _ in range(columns // 128)]))
        left, right = (random_orthogonal(size, g) for size in factors(columns))
        return {
            "DuQuant R₁·P·R₂": [rotation, Permutation(torch.randperm(columns, generator=g)), rotation],
            "PeRQ, Hadamard 128": [Hadamard(128)],
            "QuaRot, Hadamard over the width": [Hadamard(hadamard_block(columns))],
            "FlatQuant, Kronecker": [Kronecker(left, right)],
            "w4a4: Hadamard 128, a matrix per block": [Hadamard(128), matrices],
        }

    def seconds(work: Callable[[], Any], repeats: int) -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - begun) / repeats

    groups = {"qkv": (d, 3 * d), "o": (d, d), "gate_up": (d, 2 * f), "down": (f, d)}
    table = Table(
        "group", "transform", *(f"{t} tokens" for t in arguments.tokens), title="transform / linears, percent"
    )
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for role, (columns, rows) in groups.items():
            weight = torch.randn(rows, columns, generator=g)
            for name, chain in chains(columns).items():
                cells = []
                for tokens in arguments.tokens:
                    x = torch.randn(tokens, columns, generator=g)
                    repeats = max(1, 32 // tokens)
                    pairs = [
                        (
                            seconds(lambda x=x, chain=chain: run(chain, x), repeats),  # type: ignore[misc]
                            seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), repeats),  # type: ignore[misc]
                        )
                        for _ in range(arguments.rounds)
                    ]
                    transform, linear = (statistics.median(column) for column in zip(*pairs, strict=True))
                    results.append(
                        {
                            "group": role, "columns": columns, "rows": rows, "transform": name, "tokens": tokens,
                            "transform_s": transform, "linear_s": linear, "ratio": transform / linear,
                        }
                    )  # fmt: skip
                    cells.append(f"{100 * transform / linear:.1f}")
                table.add_row(role, name, *cells)
    Console().print(table)
    found = {"machine": machine.describe() | {"threads": arguments.threads}, "results": results}
    arguments.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
