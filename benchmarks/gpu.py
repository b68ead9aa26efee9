"""All that needs a GPU, in about eight minutes of one.

    python benchmarks/gpu.py [--device cuda] [--seconds 480] [--only NAME ...] [--json FILE]

Checks, each in a process of its own:

- ``tensor_cores``: the test of 2:4 linears on sparse tensor cores, which is skipped everywhere else;
- ``same``: every stage of a recipe on the device and on the CPU, on the bundled model: perplexities within 1 %;
- ``recover``: the same for training a compressed model;
- ``duquant7b``: seconds of DuQuant on Llama-2-7B's shape (random weights; the paper: 50 s on an A100).

What does not fit into the seconds is named and left out. Prints a table and writes JSON after every check; exits with 1
where a check failed. ``--device cpu`` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    "w4a16-g128": 20, "sparse50-w4": 25, "2of4-permuted": 30, "sparse70-reconstructed": 40, "w4a4-duquant": 30,
    "w4a4-quarot": 25, "larosa40": 30, "wina50": 25, "small": 40,
}  # fmt: skip
"""Shipped recipes that have every kind of step between them, and about the seconds that one takes on both devices."""
TOLERANCE = 0.01
"""Of perplexity; sums in another order flip roundings, and one flipped rounding moves all later ones."""
SAME = """
import json, sys
from pathlib import Path
import tulle
from tulle.compression.demo import evaluation_text
from tulle.compression.job import Evaluation
recipe, device, output = sys.argv[1:]
report = tulle.compress(
    "reference", recipe, output, samples=16, length=256, device=device, evaluation=Evaluation(*evaluation_text()),
)
perplexity = report["evaluation"]["compressed"]["perplexity"]
print(json.dumps({"perplexity": perplexity, "seconds": report["seconds"]["total"]}))
"""
RECOVER = {
    "name": "recover", "calibration": {"samples": 16, "length": 256},
    "steps": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 64}}],
    "recover": {"tokens": 81_920, "context": 256, "batch": 8, "rate": 5.0e-3},
}  # fmt: skip


def both(recipe: str, device: str) -> dict[str, Any]:
    """A recipe on the device and on the CPU."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for which, where in (("device", device), ("cpu", "cpu")):
            run = subprocess.run(
                [sys.executable, "-c", SAME, recipe, where, str(Path(folder) / which)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found[which] = json.loads(run.stdout.splitlines()[-1])
    ratio = found["device"]["perplexity"] / found["cpu"]["perplexity"]
    return found | {"ratio": ratio, "passed": abs(ratio - 1) <= TOLERANCE}


def recover(device: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(RECOVER, file)
        file.flush()
        return both(file.name, device)


def tensor_cores(device: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "tests/hf/test_register.py", "-k", "sparse_tensor_cores_give"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    last = run.stdout.strip().splitlines()[-1]
    return {"output": last, "passed": run.returncode == 0 and "1 passed" in last}


def duquant7b(device: str) -> dict[str, Any]:
    """128 × 2048 tokens, as published; the checkpoint is written first, which is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        subprocess.run(
            [
                sys.executable, str(ROOT / "benchmarks/compress_large.py"), "--folder", folder, "--shape", "7b",
                "--recipe", str(ROOT / "benchmarks/duquant_fast.yaml"), "--samples", "128", "--length", "2048",
                "--device", device, "--json", str(result),
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = json.loads(result.read_text())["seconds"]
    return {"seconds": seconds, "passed": True}


def checks() -> dict[str, tuple[Callable[[str], dict[str, Any]], int]]:
    """By name: the check, and about the seconds that it takes."""
    found: dict[str, tuple[Callable[[str], dict[str, Any]], int]] = {"tensor_cores": (tensor_cores, 20)}
    for name, seconds in RECIPES.items():
        found[f"same {name}"] = (lambda device, name=name: both(name, device), seconds)  # type: ignore[misc]
    return found | {"recover": (recover, 40), "duquant7b": (duquant7b, 150)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    options = parser.parse_args()
    begun, found = time.monotonic(), {}
    for name, (check, seconds) in checks().items():
        if options.only and not any(name.startswith(prefix) for prefix in options.only):
            continue
        started = time.monotonic()
        if started - begun + seconds > options.seconds:
            found[name] = {"passed": None, "why": f"left out: {seconds} seconds were not left"}
            continue
        try:
            found[name] = check(options.device)
        except subprocess.CalledProcessError as error:
            found[name] = {"passed": False, "why": f"exit code {error.returncode}"}
        found[name]["wall_seconds"] = time.monotonic() - started
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"device": options.device, "checks": found}, indent=1) + "\n")
    table = Table("check", "passed", "device / CPU", "seconds")
    for name, row in found.items():
        passed = {True: "yes", False: "NO", None: row.get("why", "")}[row["passed"]]
        ratio = f"{row['ratio']:.4f}" if "ratio" in row else ""
        table.add_row(name, passed, ratio, f"{row.get('wall_seconds', 0):.0f}")
    Console().print(table)
    sys.exit(any(row["passed"] is False for row in found.values()))


if __name__ == "__main__":
    main()
