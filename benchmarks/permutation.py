"""Channel permutation searches for 2:4: efficacy and seconds, the paper's searches beside ours.

    python benchmarks/permutation.py [--limit 60] [--threads 1]

Efficacy (Pool & Yu 2021, section 5): of what the stripes cost against the N/M largest scores of every row, the share
won back. Matrices of 128 rows, uniform, seed 1, as in the paper's comparison at 64 columns (published there: swaps
32.1 %, with 1000 escapes 36.0 %, groups of two stripes 35.5 %, of three 36.6 %), square ones, and the gate/up group of
Llama-2-7B's shape: 22016 rows × 4096 columns of |Gaussian| weights whose columns and rows differ in size. Every search
runs in a process of its own, which ends after ``--limit`` seconds; it is not tried on more columns then. Finished cells
of the JSON are kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells  # noqa: E402

SEARCHES = (
    "swaps", "swaps, 100 escapes", "swaps, 1000 escapes", "groups of 2 stripes", "groups of 3 stripes", "ours",
)  # fmt: skip
NARROW = tuple((128, columns) for columns in (64, 128, 256, 512, 1024, 2048, 4096))
SQUARE = tuple((n, n) for n in (256, 512, 1024, 2048, 4096))
LLAMA = (22016, 4096)


def measure(name: str, rows: int, columns: int, threads: int, result: Connection) -> None:
    """Sends the cell of one search."""
    import numpy as np
    import torch

    from tulle.core.masks import Pattern
    from tulle.core.permutation import efficacy, greedy_swaps, search, stripe_groups

    torch.set_num_threads(threads)
    if (rows, columns) == LLAMA:
        generator = np.random.default_rng(0)
        weights = np.abs(generator.standard_normal((rows, columns), dtype=np.float32))
        weights *= np.exp(0.3 * generator.standard_normal((1, columns), dtype=np.float32))
        weights *= np.exp(0.2 * generator.standard_normal((rows, 1), dtype=np.float32))
    else:
        weights = np.random.RandomState(1).rand(rows, columns).astype(np.float32)
    scores, pattern = torch.from_numpy(weights), Pattern(2, 4)
    run = {
        "swaps": lambda: greedy_swaps(scores, pattern),
        "swaps, 100 escapes": lambda: greedy_swaps(scores, pattern, 100),
        "swaps, 1000 escapes": lambda: greedy_swaps(scores, pattern, 1000),
        "groups of 2 stripes": lambda: stripe_groups(scores, pattern, 2),
        "groups of 3 stripes": lambda: stripe_groups(scores, pattern, 3),
        "ours": lambda: search(scores, pattern, threads=threads),
    }[name]
    begun = time.perf_counter()
    index = run()
    seconds = time.perf_counter() - begun
    found = efficacy(scores, pattern, index)
    result.send(
        {
            "seconds": seconds,
            "efficacy": found.value,
            "kept_before": found.before,
            "kept_after": found.after,
            "ideal": found.ideal,
            "threads": threads,
        }  # fmt: skip
    )


def within(limit: float, *arguments: Any) -> dict[str, Any]:
    """The cell, or how long it was waited for."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(*arguments, send))
    process.start()
    send.close()
    try:
        if receive.poll(limit):
            found: dict[str, Any] = receive.recv()
            return found
        return {"over": limit}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60, help="seconds that one of the paper's searches may take")
    parser.add_argument("--threads", type=int, default=1, help="of all but the last matrix, which takes two")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/permutation.json")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from tulle import machine

    cells = Cells(arguments.out, machine=machine.describe())
    table = Table("rows × columns", *SEARCHES, title="efficacy in percent (seconds)")
    for sizes in (NARROW, SQUARE, (LLAMA,)):
        over: set[str] = set(SEARCHES[:-1]) if sizes == (LLAMA,) else set()
        for rows, columns in sizes:
            shown = []
            for name in SEARCHES:
                if name in over:
                    shown.append("–")
                    continue
                limit = arguments.limit if name != "ours" else 600.0
                threads = 2 if (rows, columns) == LLAMA else arguments.threads
                found = cells.make(
                    f"{rows} × {columns}/{name}",
                    lambda a=(limit, name, rows, columns, threads): within(*a),  # type: ignore[misc]
                )
                if "over" in found:
                    over.add(name)
                    shown.append(f"over {found['over']:.0f} s")
                else:
                    shown.append(f"{100 * found['efficacy']:.1f} ({found['seconds']:.2f})")
                    print(f"{rows} × {columns}, {name}: {shown[-1]}", flush=True)
            table.add_row(f"{rows} × {columns}", *shown)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
