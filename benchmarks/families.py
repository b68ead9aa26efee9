"""The engine against transformers for every family, dense and compressed: the table of docs/reference/families.md.

    python benchmarks/families.py [--families qwen3 …]

A small random model of each family, as the tests make it, runs three times: as it is, with weights of 4 bits (GPTQ in
groups of 32), and with half of them pruned before (SparseGPT). Max |Δ| over a prompt of 36 tokens and the vocabulary,
over the greatest |logit|, of the engine (cache in float32, head as stored) against transformers, with the packed model
in it where it is compressed. The larger one of two: the prompt at once, and token by token. Weights in codes are
multiplied with inputs that the engine rounds to 16 bits.

Finished cells of the JSON are kept. Then `python docs/generate.py` writes the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
from cells import Cells, import_methods  # noqa: E402

GROUPS: dict[str, Any] = {"gptq": {"bits": 4, "group_size": "auto-32"}}
FORMS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "w4a16": [GROUPS],
    "sparse50-w4": [{"sparsegpt": {"sparsity": 0.5}}, GROUPS],
}
PROMPT = list(b"A fox that is quick jumps over dogs.")
SEED = 3
CALIBRATION = {"samples": 4, "length": 24}


def measure(family: str) -> dict[str, float]:
    """The three forms of one family."""
    from family_folders import write_family
    from tulle.compression.job import compress
    from tulle.text.reading import Text

    text = Text(("The quick brown fox jumps over the lazy dog. " * 20,), False, ("prose",))
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        dense = write_family(Path(temporary) / "dense", family, SEED)
        for form, steps in FORMS.items():
            made = dense if form == "dense" else Path(temporary) / form
            if steps:
                compress(dense, {"calibration": CALIBRATION, "steps": steps}, made, calibration=text)
            found[form] = difference(made)
    return found


def difference(folder: Path) -> float:
    """Of a model folder, over the greatest logit."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import tulle
    from tulle.engine import Engine
    from tulle.models.source import open_source, packed_by_tulle

    load = AutoModelForCausalLM.from_pretrained if packed_by_tulle(open_source(folder)) is None else tulle.load
    with torch.no_grad():
        wanted = load(folder, dtype=torch.float32)(torch.tensor(PROMPT)[None]).logits[0].numpy()
    engine = Engine(folder, threads=2, cache="f32", head="as stored")
    at_once = engine.forward(PROMPT)
    engine = Engine(folder, threads=2, cache="f32", head="as stored", context=len(PROMPT))
    one_by_one = np.concatenate([engine.forward([token], 0, place) for place, token in enumerate(PROMPT)])
    return max(float(np.abs(one - wanted).max() / np.abs(wanted).max()) for one in (at_once, one_by_one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", help="[all]")
    parser.add_argument("--out", type=Path, default=HERE / "results/families.json")
    arguments = parser.parse_args()

    from tulle import machine
    from tulle.models.description import families

    import_methods()
    cells = Cells(arguments.out, machine=machine.describe())
    for family in arguments.families or families():
        figures = cells.make(family, partial(measure, family))
        print(family, *(f"{form} {figures[form]:.1e}" for form in FORMS), flush=True)


if __name__ == "__main__":
    main()
