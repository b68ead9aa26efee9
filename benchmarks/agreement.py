"""The engine's logits and greedy tokens against the simulated torch model's, for every shipped recipe.

    python benchmarks/agreement.py [--data DIR] [--models reference tinystories] [--recipes …]

Max |Δ| over 200 tokens and the vocabulary, over the greatest |logit|: of the engine as exact as it can be (cache in
float32, head as stored), of the engine as it comes, and of torch against itself, token by token with a cache instead of
one pass. The last is how far rounding alone carries a model: where inputs are quantised, a sum that differs in its last
bit is rounded the other way now and then. Then how many of 128 greedy tokens agree from the first on. Finished cells of
the JSON are kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, import_methods  # noqa: E402

SAMPLES, LENGTH, TOKENS, PROMPT, GREEDY = 16, 256, 200, 16, 128
PROSE = "Once upon a time there was a little girl who lived in a small house. One day she saw a big dog. " * 12


def measure(folder: Path, recipe: str, calibration: dict[str, Any], text: str) -> dict[str, float]:
    """One cell."""
    import numpy as np
    import torch

    from tulle.compression.job import compress
    from tulle.engine import Engine
    from tulle.evaluate.loading import load_model

    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "model"
        if recipe == "dense":
            shutil.copytree(folder, made)
        else:
            compress(folder, recipe, made, samples=SAMPLES, length=LENGTH, **calibration)
        model, tokenizer = load_model(made)
        ids = tokenizer(text)["input_ids"][:TOKENS]
        with torch.inference_mode():
            wanted = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
            parts, cache = [], None
            for token in ids:
                found = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                parts.append(found.logits[0].numpy())
            greedy = model.generate(
                torch.tensor([ids[:PROMPT]]), max_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, PROMPT:].tolist()

        def off(logits: Any) -> float:
            return float(np.abs(logits - wanted).max() / np.abs(wanted).max())

        cell = {"torch_itself": off(np.concatenate(parts))}
        for name, options in (("exact", {"cache": "f32", "head": "as stored"}), ("default", {})):
            engine = Engine(made, **options)
            cell[name] = off(engine.forward(ids))
            tokens = engine.generate(ids[:PROMPT], GREEDY, ignore_end=True).tokens
            pairs = zip(tokens, greedy, strict=True)
            cell[f"{name}_greedy"] = next((i for i, (a, b) in enumerate(pairs) if a != b), GREEDY)
        return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/tinystories-656K and text/tinystories_10k.txt")
    parser.add_argument("--models", nargs="*", choices=("reference", "tinystories"), default=["reference"])
    parser.add_argument("--recipes", nargs="*", help="[all shipped ones that compress]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/agreement.json")
    arguments = parser.parse_args()
    if "tinystories" in arguments.models and not arguments.data:
        parser.error("--data is required for tinystories")

    import torch
    import yaml
    from rich.console import Console
    from rich.table import Table

    from tulle import machine
    from tulle.models.hub import local_folder

    torch.set_num_threads(arguments.threads)
    import_methods()
    files = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    shipped = [f.stem for f in files if "training" not in (found := yaml.safe_load(f.read_text())) and "steps" in found]
    cells = Cells(arguments.out, machine=machine.describe())
    for name in arguments.models:
        if name == "reference":
            folder, calibration = local_folder("reference"), {}
            text = Path(argparse.__file__).read_text()[2000:6000]
        else:
            folder = arguments.data / "models/tinystories-656K"
            stories = str(arguments.data / "text/tinystories_10k.txt")
            calibration = {
                "calibration": [stories], "separator": "<|endoftext|>", "documents": (200, 456), "min_chars": 101,
            }  # fmt: skip
            text = PROSE
        table = Table("recipe", "exact", "as it comes", "torch itself", "greedy exact", "greedy", title=name)
        for recipe in arguments.recipes or ["dense", *shipped]:
            c = cells.make(f"{name}/{recipe}", partial(measure, folder, recipe, calibration, text))
            print(name, recipe, c, flush=True)
            figures = [f"{c[key]:.1e}" for key in ("exact", "default", "torch_itself")]
            table.add_row(recipe, *figures, str(c["exact_greedy"]), str(c["default_greedy"]))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
