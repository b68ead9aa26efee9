"""The whole story on the bundled model: dense, then a shipped recipe of every kind; size against quality."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tulle import machine
from tulle.compression.job import compress
from tulle.compression.recipe import load_recipe
from tulle.errors import UserError
from tulle.evaluate import Protocol, evaluate_text
from tulle.evaluate.loading import load_model
from tulle.inspect.weights import inspect_model
from tulle.models.checkpoint import write_text
from tulle.models.hub import REFERENCE, local_folder
from tulle.report.compression import write_report
from tulle.report.demo import write_demo
from tulle.text.reading import Text

SAMPLES = 32
"""Calibration sequences per recipe, fewer than the recipes ask for: the demo is to take minutes."""
RECIPES = (
    "w8a8", "w8a8-smoothquant", "w4a16-g128", "w4a4-duquant", "w4a4-quarot",
    "sparse50", "sparse50-w4", "sparse70", "2of4", "2of4-permuted",
)  # fmt: skip
"""One of every kind that takes seconds on the reference model; those that train take minutes."""
CALIBRATION_MODULES = 40
"""Modules that the sequences are drawn from; all of them would take longer to tokenize than a recipe to run."""
CHARACTERS = 4_000
"""Evaluated of each held-out module."""
PROMPT = """class Reader:
    def __init__(self, path):
        self.path = path

    def"""
SAMPLE_TOKENS = 48
REPETITION_PENALTY = 1.15
"""Greedy decoding of a model this small repeats itself without."""
MARK = "demo.json"

Progress = Callable[[str, int, int], None]


def evaluation_text(characters: int = CHARACTERS) -> tuple[Text, Protocol]:
    """The beginning of every held-out module of the standard library, in windows of the model's context."""
    from tulle.text.standard_library import held_out_text

    modules = [module[:characters] for module in held_out_text()]
    return Text.of(
        modules, f"first {characters:,} characters of each held-out module of Python's standard library"
    ), Protocol(whole=True)


def calibration_modules() -> Text:
    """Modules of the standard library's training side, as one stream."""
    from tulle.text.standard_library import calibration_text

    modules = calibration_text()[:CALIBRATION_MODULES]
    return Text(tuple(modules), False, (f"{len(modules)} training-side modules of Python's standard library",))


def run_demo(
    output: str | Path, progress: Progress, samples: int = SAMPLES, characters: int = CHARACTERS
) -> dict[str, Any]:
    """Compresses ``reference`` by the shipped ``RECIPES`` into ``output/RECIPE`` and writes ``output/report.html``.

    Returns what ``output/demo.json`` holds: rows with bits per byte, bytes, bits per weight, sparsity and seconds. A
    folder that an earlier demo wrote is replaced. Raises ``UserError`` if ``output`` holds anything else.
    """
    begun = time.perf_counter()
    folder = Path(output)
    _claim(folder)
    text, protocol = evaluation_text(characters)
    names = RECIPES
    total = 100 * (len(names) + 1)  # percent of each model
    progress("dense", 0, total)
    dense = inspect_model(local_folder(REFERENCE))
    rows: list[dict[str, Any]] = [
        {"name": "dense", "description": "the reference model as it is, bf16", "bytes": dense["totals"]["bytes"],
         "linear_bytes": dense["totals"]["linear_bytes"], "bits_per_weight": dense["totals"]["bits_per_weight"],
         "sparsity": 0.0, "compress_seconds": None, "peak_memory_bytes": None}
        | _quality(local_folder(REFERENCE), text, protocol)
    ]  # fmt: skip
    calibration: dict[str, Any] = {}
    source = calibration_modules()
    for number, name in enumerate(names, 1):

        def tell(stage: str, done: int, of: int, name: str = name, number: int = number) -> None:
            progress(f"{name}: {stage}", 100 * number + 100 * done // of, total)

        report = compress(REFERENCE, name, folder / name, calibration=source, samples=samples, progress=tell)
        calibration = report["calibration"]
        quality = _quality(folder / name, text, protocol)
        report["evaluation"] = {
            "protocol": rows[0]["protocol"],
            "dense": _figures(rows[0]),
            "compressed": _figures(quality),
        }
        write_text(folder / name / "report.json", json.dumps(report, indent=2) + "\n")
        write_report(report, folder / name / "report.html")
        totals = report["totals"]
        rows.append(
            {"name": name, "description": load_recipe(name).description, "bytes": totals["packed_bytes"],
             "linear_bytes": totals["linear_packed_bytes"], "bits_per_weight": totals["bits_per_weight"],
             "sparsity": totals["sparsity"], "compress_seconds": report["seconds"]["total"],
             "peak_memory_bytes": report["peak_memory_bytes"]}
            | quality
        )  # fmt: skip
    rows[1:] = sorted(rows[1:], key=lambda row: (-row["bytes"], row["bits_per_byte"]))
    found = {
        "finished": True,
        "model": REFERENCE,
        "architecture": dense["architecture"],
        "calibration": calibration,
        "protocol": rows[0]["protocol"],
        "prompt": PROMPT,
        "rows": rows,
        "seconds": time.perf_counter() - begun,
        "machine": machine.describe(),
    }
    write_text(folder / MARK, json.dumps(found, indent=2) + "\n")
    write_demo(found, folder / "report.html")
    progress("done", total, total)
    return found


def _claim(folder: Path) -> None:
    """Empties a folder of an earlier demo; refuses any other that holds something."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a new or empty folder, found a file at {folder}; try another -o")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise UserError(f"expected a new or empty folder, found files in {folder}; try another -o")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MARK, json.dumps({"finished": False}) + "\n")


def _quality(folder: Path, text: Text, protocol: Protocol) -> dict[str, Any]:
    """Scores of a model, and how it goes on with the prompt."""
    import torch

    begun = time.perf_counter()
    model, tokenizer = load_model(folder)
    score = evaluate_text(model, tokenizer, text, protocol)
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = torch.tensor([begin + tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        grown = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            pad_token_id=tokenizer.pad_token_id,
        )
    sample = tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True)
    del model
    gc.collect()
    figures = {key: value for key, value in score.items() if key != "bytes"}  # a row's bytes are the model's
    return figures | {"scored_bytes": score["bytes"], "sample": sample, "evaluate_seconds": time.perf_counter() - begun}


def _figures(quality: dict[str, Any]) -> dict[str, Any]:
    return {key: quality[key] for key in ("perplexity", "bits_per_byte", "tokens")}
