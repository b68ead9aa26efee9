"""Channel permutation searches for 2:4: efficacy and seconds, the paper's searches beside ours.

    python benchmarks/permutation.py [--limit 120] [--threads 1]

Efficacy (Pool & Yu 2021, section 5): of what the stripes cost against the N/M largest scores of every row, the share
won back. Matrices of 128 rows, uniform, seed 1, as in the paper's comparison at 64 columns (published there: swaps
32.1 %, with 1000 escapes 36.0 %, groups of two stripes 35.5 %, of three 36.6 %), square ones, and the gate/up group of
Llama-2-7B's shape: 22016 rows × 4096 columns of |Gaussian| weights whose columns and rows differ in size. A search that
was expected to take longer than ``--limit`` seconds is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=120, help="seconds that a search may be expected to take")
    parser.add_argument("--threads", type=int, default=1, help="of all but the last matrix, which takes two")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/permutation.json")
    arguments = parser.parse_args()

    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table

    from tulle import machine
    from tulle.core.masks import Pattern
    from tulle.core.permutation import efficacy, greedy_swaps, search, stripe_groups

    torch.set_num_threads(arguments.threads)
    pattern = Pattern(2, 4)
    # Name → search, and the order of its time in columns C and rows R: what predicts it from the size before.
    searches: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[float, float], float]]] = {
        "swaps": (lambda s: greedy_swaps(s, pattern), lambda c, r: c**3 * r),
        "swaps, 100 escapes": (lambda s: greedy_swaps(s, pattern, 100), lambda c, r: c**3 * r),
        "swaps, 1000 escapes": (lambda s: greedy_swaps(s, pattern, 1000), lambda c, r: c**3 * r),
        "groups of 2 stripes": (lambda s: stripe_groups(s, pattern, 2), lambda c, r: c**3 * r),
        "groups of 3 stripes": (lambda s: stripe_groups(s, pattern, 3), lambda c, r: c**4 * r),
        "ours": (lambda s: search(s, pattern), lambda c, r: c**2 * r),
    }
    sizes = [(128, c) for c in (64, 128, 256, 512, 1024, 2048, 4096)] + [(n, n) for n in (256, 512, 1024, 2048, 4096)]
    results: list[dict[str, Any]] = []
    table = Table("rows × columns", *searches, title="efficacy in percent (seconds)")
    expected: dict[tuple[str, bool], tuple[float, float]] = {}

    def measure(name: str, scores: torch.Tensor) -> dict[str, Any]:
        begun = time.perf_counter()
        index = searches[name][0](scores)
        seconds = time.perf_counter() - begun
        found = efficacy(scores, pattern, index)
        rows, columns = scores.shape
        return {
            "rows": rows, "columns": columns, "search": name, "seconds": seconds, "efficacy": found.value,
            "kept_before": found.before, "kept_after": found.after, "ideal": found.ideal,
        }  # fmt: skip

    for rows, columns in sizes:
        scores = torch.from_numpy(np.random.RandomState(1).rand(rows, columns).astype(np.float32))
        cells = []
        for name, (_, order) in searches.items():
            known = expected.get((name, rows == 128))
            if name != "ours" and known is not None and known[0] * order(columns, rows) / known[1] > arguments.limit:
                cells.append("–")
                continue
            found = measure(name, scores)
            expected[name, rows == 128] = (found["seconds"], order(columns, rows))
            results.append(found)
            cells.append(f"{100 * found['efficacy']:.1f} ({found['seconds']:.2f})")
        table.add_row(f"{rows} × {columns}", *cells)
    torch.set_num_threads(2)
    generator = np.random.default_rng(0)
    weights = np.abs(generator.standard_normal((22016, 4096), dtype=np.float32))
    weights *= np.exp(0.3 * generator.standard_normal((1, 4096), dtype=np.float32))
    weights *= np.exp(0.2 * generator.standard_normal((22016, 1), dtype=np.float32))
    found = measure("ours", torch.from_numpy(weights)) | {"case": "gate/up of Llama-2-7B's shape, 2 threads"}
    results.append(found)
    blank = ["–"] * (len(searches) - 1)
    table.add_row("22016 × 4096, 2 threads", *blank, f"{100 * found['efficacy']:.1f} ({found['seconds']:.1f})")
    Console(width=150).print(table)
    described = machine.describe() | {"threads": arguments.threads}
    arguments.out.write_text(json.dumps({"machine": described, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
