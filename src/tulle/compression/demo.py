"""The whole story on the bundled model: dense, then shipped recipes of every kind; size, quality and speed of each.

Quality and speed are those of one program, the native engine, as it comes: the same weights, cache and output head that
are timed are the ones that are scored.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tulle import machine
from tulle.compression.job import compress
from tulle.compression.recipe import load_recipe
from tulle.engine import Engine
from tulle.engine.bench import time_in_turn
from tulle.engine.sampling import Sampling
from tulle.errors import UserError
from tulle.evaluate import Protocol, evaluate_text
from tulle.evaluate.engine import load_engine
from tulle.inspect.weights import inspect_model
from tulle.models.checkpoint import write_text
from tulle.models.hub import REFERENCE, local_folder
from tulle.report import units
from tulle.report.compression import write_report
from tulle.report.demo import write_demo
from tulle.text.reading import Text

RECIPES = (
    "w8a8", "w8a8-smoothquant", "w4a16-g128", "w4a4-quarot", "sparse50", "2of4", "sparse50-w4", "sparse70-w4",
)  # fmt: skip
"""One of every kind that takes seconds on the reference model; those that train take minutes."""
SAMPLES = 16
"""Calibration sequences per recipe, fewer than the recipes ask for: the demo is to take minutes."""
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
TIMED_PROMPT, TIMED_TOKENS, ROUNDS = 64, 64, 15
"""Of each model a round times so many decoded tokens after a prompt of so many."""
BUSY = 0.1
"""Decoding that varies by more between rounds was disturbed by other work on the machine."""
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
    output: str | Path,
    progress: Progress,
    line: Callable[[str], None] = lambda text: None,
    samples: int = SAMPLES,
    characters: int = CHARACTERS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Compresses ``reference`` by the shipped ``RECIPES`` into ``output/RECIPE`` and writes ``output/report.html``.

    ``progress(stage, done, total)`` is called often, ``line`` with one line of text after each step. Returns what
    ``output/demo.json`` holds: rows with bytes, bits per weight, sparsity, bits per byte, tokens/s and seconds. A
    folder that an earlier demo wrote is replaced. Raises ``UserError`` if ``output`` holds anything else.
    """
    begun = time.perf_counter()
    folder = Path(output)
    _claim(folder)
    names = RECIPES
    # Percent of each model, and of the timing at the end.
    total = 100 * (len(names) + 2)
    text, protocol = evaluation_text(characters)
    calibration: dict[str, Any] = {}
    source = calibration_modules()

    progress("dense: evaluate", 0, total)
    dense = inspect_model(local_folder(REFERENCE))
    engines: list[Engine] = []
    rows = [_dense_row(dense)]
    engines.append(_evaluate(rows[0], local_folder(REFERENCE), text, protocol, line))
    for number, name in enumerate(names, 1):

        def tell(stage: str, done: int, of: int, name: str = name, number: int = number) -> None:
            progress(f"{name}: {stage}", 100 * number + 95 * done // of, total)

        report = compress(REFERENCE, name, folder / name, calibration=source, samples=samples, progress=tell)
        calibration = report["calibration"]
        rows.append(_compressed_row(name, report))
        line(_step("compress", name, report["seconds"]["total"], _size(rows[-1])))
        progress(f"{name}: evaluate", 100 * number + 95, total)
        engines.append(_evaluate(rows[-1], folder / name, text, protocol, line))
        report["evaluation"] = {
            "protocol": rows[-1]["protocol"],
            "dense": _figures(rows[0]),
            "compressed": _figures(rows[-1]),
        }
        write_text(folder / name / "report.json", json.dumps(report, indent=2) + "\n")
        write_report(report, folder / name / "report.html")

    def told(done: int, of: int) -> None:
        progress("time decoding", total - 100 + 100 * done // of, total)

    speed = _time(rows, engines, rounds, told, line)
    rows[1:] = sorted(rows[1:], key=lambda row: (-row["bytes"], row["bits_per_byte"]))
    found = {
        "finished": True,
        "model": REFERENCE,
        "architecture": dense["architecture"],
        "calibration": calibration,
        "protocol": rows[0]["protocol"],
        "prompt": PROMPT,
        "speed": speed,
        "rows": rows,
        "seconds": time.perf_counter() - begun,
        "machine": machine.describe() | {"cache_bytes": machine.cache_bytes()},
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


def _dense_row(found: Mapping[str, Any]) -> dict[str, Any]:
    totals = found["totals"]
    return {
        "name": "dense", "kind": "dense", "description": "The reference model as it is, in bfloat16.",
        "bytes": totals["bytes"], "linear_bytes": totals["linear_bytes"], "bits_per_weight": totals["bits_per_weight"],
        "sparsity": 0.0, "compress_seconds": None, "peak_memory_bytes": None,
    }  # fmt: skip


def _compressed_row(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    totals, linears = report["totals"], report["linears"]
    kinds = {
        "low-bit": any(linear["bits"] is not None for linear in linears),
        "sparse": any(linear["mask"] is not None for linear in linears),
    }
    return {
        "name": name, "kind": " and ".join(sorted((k for k, v in kinds.items() if v), reverse=True)),
        "description": load_recipe(name).description, "bytes": totals["packed_bytes"],
        "linear_bytes": totals["linear_packed_bytes"], "bits_per_weight": totals["bits_per_weight"],
        "sparsity": totals["sparsity"], "compress_seconds": report["seconds"]["total"],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }  # fmt: skip


def _evaluate(row: dict[str, Any], folder: Path, text: Text, protocol: Protocol, line: Callable[[str], None]) -> Engine:
    """Adds scores and a sample of a model to its row; returns the engine that runs it."""
    begun = time.perf_counter()
    model, tokenizer = load_engine(folder)
    score = dict(evaluate_text(model, tokenizer, text, protocol))
    row["scored_bytes"] = score.pop("bytes")  # a row's bytes are the model's
    sampling = Sampling(repetition_penalty=REPETITION_PENALTY)
    row |= score | {"sample": model.engine.generate(PROMPT, SAMPLE_TOKENS, sampling).text}
    row["evaluate_seconds"] = time.perf_counter() - begun
    line(_step("evaluate", row["name"], row["evaluate_seconds"], f"{row['bits_per_byte']:.4f} bits per byte"))
    return model.engine


def _time(
    rows: Sequence[dict[str, Any]],
    engines: Sequence[Engine],
    rounds: int,
    told: Callable[[int, int], None],
    line: Callable[[str], None],
) -> dict[str, Any]:
    """Adds decoding speed to every row, all models taking turns; returns how it was measured."""
    begun = time.perf_counter()
    for engine in engines:
        engine.take_bytes_per_token()
    prompt = min(TIMED_PROMPT, *(engine.context - TIMED_TOKENS for engine in engines))
    times = time_in_turn(engines, prompt, TIMED_TOKENS, rounds, told)
    spreads = []
    for row, engine, own in zip(rows, engines, times, strict=True):
        decode = sorted(seconds for _, seconds in own)
        middle = statistics.median(decode)
        low, high = decode[len(decode) // 4], decode[-1 - len(decode) // 4]
        row |= {
            "decode_tokens_per_s": 1 / middle, "decode_tokens_per_s_quartiles": [1 / high, 1 / low],
            "prefill_tokens_per_s": prompt / statistics.median(seconds for seconds, _ in own),
            "read_bytes": engine.take_bytes_per_token(), "weight_bytes": engine.weight_bytes, "layout": engine.layout,
        }  # fmt: skip
        spreads.append((high - low) / middle)
    for row in rows:
        row["speedup"] = row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
    spread = statistics.median(spreads)
    seconds = time.perf_counter() - begun
    line(_step("time", "decoding", seconds, f"{len(rows)} models in turn, medians of {rounds} rounds"))
    return {
        "prompt": prompt, "tokens": TIMED_TOKENS, "rounds": rounds, "threads": engines[0].threads, "spread": spread,
        "disturbed": spread > BUSY, "seconds": seconds,
    }  # fmt: skip


def _step(action: str, name: str, seconds: float, found: str) -> str:
    """``compress w8a8              35.1 s  6.93 MB, 8.05 bits per weight``."""
    return f"{action:<8} {name:<18} {units.duration(seconds):>12}  {found}"


def _size(row: Mapping[str, Any]) -> str:
    return f"{units.size(row['bytes'])}, {row['bits_per_weight']:.2f} bits per weight"


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("perplexity", "bits_per_byte", "tokens")}
