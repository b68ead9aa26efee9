"""The shipped W4A4, W6A6 and W8A8 recipes as they are, on tinystories-656K with the protocol of peer_tinystories.py.

    python benchmarks/w4a4_recipes.py --data DIR [--recipes …]

256 calibration stories, 100 evaluated. Each recipe as shipped, with quantised keys and values; without them (the
linears alone, which is what llm-compressor 0.14 was measured at: RTN 25.00, GPTQ 24.13, SmoothQuant + GPTQ 24.14); and
without them on the model with massive outliers. Finished cells of the JSON are kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, import_methods  # noqa: E402
from w4a4 import Bench  # noqa: E402

RECIPES = ("w4a4-duquant", "w4a4-duquant-lwc", "w4a4-quarot", "w4a4", "w6a6-duquant", "w8a8-smoothquant")
CASES = ("linears", "massive", "shipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/w4a4_recipes.json")
    arguments = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.table import Table

    from tulle import machine
    from tulle.compression.recipe import load_recipe

    torch.set_num_threads(arguments.threads)
    import_methods()
    cells = Cells(
        arguments.out,
        machine=machine.describe() | {"threads": arguments.threads},
        protocol=" ".join(str(__doc__).split("\n\n")[2].split()),
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("tinystories", arguments.data, Path(folder), 256)
        dense = cells.make("dense", partial(bench.perplexity, bench.model))
        for case in arguments.cases:
            model = bench.variant("massive" if case == "massive" else "raw")
            for name in arguments.recipes:
                recipe = load_recipe(name)
                steps = [s for s in recipe.to_json()["steps"] if case == "shipped" or "kv_cache" not in s]
                for seed in range(arguments.seeds):
                    key = f"{name}/{case}/{seed}"
                    found = cells.make(key, partial(bench.run, model, steps, recipe.calibration.target, seed))
                    print(key, round(found["perplexity"], 3), flush=True)
    table = Table("recipe", *CASES, title=f"perplexity (dense {dense:.2f})")
    for name in RECIPES:
        columns = [[c["perplexity"] for k, c in cells.all.items() if k.startswith(f"{name}/{case}/")] for case in CASES]
        table.add_row(name, *(" ".join(f"{p:.2f}" for p in values) or "–" for values in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
