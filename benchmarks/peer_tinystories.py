"""Tulle against llm-compressor on tinystories-656K: same model, same calibration tokens, same evaluation code.

    python benchmarks/peer_tinystories.py --data DIR --peer-python PYTHON [--only CASE ...] [--threads N]

DIR holds ``models/tinystories-656K`` and ``text/tinystories_10k.txt``; PYTHON is the interpreter of a virtual
environment with llm-compressor in it. Protocol: documents between ``<|endoftext|>``, stripped, of more than 100
characters; calibration on documents 200-455, evaluation on the first 100, one document per sequence with BOS, cut
at 512 tokens. Every case is run by the peer (one step, its defaults) and by four recipes of ours: ``paper`` is the
published method alone; ``layer``, ``dense`` and ``stream`` are our step with its defaults and that
``calibration: target``. Prints a table; writes results/peer_tinystories.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

SEPARATOR, MIN_CHARS, LENGTH = "<|endoftext|>", 101, 512
CALIBRATION, EVALUATION = (200, 456), (0, 100)

GPTQ_PAPER = {"act_order": False, "clip_search": 0, "descent": 0}
CASES: dict[str, dict[str, Any]] = {
    "GPTQ W4A16, group 64": {
        "peer": {"modifier": "gptq", "group_size": 64},
        "step": {"gptq": {"bits": 4, "group_size": 64}},
        "paper": {"gptq": {"bits": 4, "group_size": 64, **GPTQ_PAPER}},
    },
    "GPTQ W4A16, per channel": {
        "peer": {"modifier": "gptq", "group_size": None},
        "step": {"gptq": {"bits": 4}},
        "paper": {"gptq": {"bits": 4, **GPTQ_PAPER}},
    },
    "SparseGPT 50 %": {
        "peer": {"modifier": "sparsegpt", "mask_structure": "0:0"},
        "step": {"sparsegpt": {"sparsity": 0.5}},
        "paper": {"sparsegpt": {"sparsity": 0.5, "refit": False}},
    },
    "Wanda 50 %": {
        "peer": {"modifier": "wanda", "mask_structure": "0:0"},
        "step": {"wanda": {"sparsity": 0.5, "refit": True}},
        "paper": {"wanda": {"sparsity": 0.5}},
    },
    "SparseGPT 2:4": {
        "peer": {"modifier": "sparsegpt", "mask_structure": "2:4"},
        "step": {"sparsegpt": {"pattern": "2:4"}},
        "paper": {"sparsegpt": {"pattern": "2:4", "refit": False}},
    },
}
"""Per case: the peer's modifier, our step with its defaults, and our step as published."""


def peer_worker(job_file: Path) -> None:
    """Runs in the peer's environment: one oneshot call; writes the linears' weights and the seconds it took."""
    import torch
    from datasets import Dataset
    from llmcompressor import __version__, oneshot
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    job = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job.get("dtype", "float32")))
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["sequences"]])
    begun = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=[_modifier(job["peer"])],
        max_seq_length=job.get("length", LENGTH),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - begun
    weights = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    save_file(weights, job["weights"])
    result = {"seconds": seconds, "version": __version__, "torch": torch.__version__}
    Path(job["result"]).write_text(json.dumps(result))


def _modifier(settings: dict[str, Any]) -> Any:
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    if settings["modifier"] == "gptq":
        size = settings["group_size"]
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group" if size else "channel"}
        group = {"targets": ["Linear"], "weights": weights | {"group_size": size}}
        return GPTQModifier(ignore=["lm_head"], config_groups={"group_0": group})
    modifier = SparseGPTModifier if settings["modifier"] == "sparsegpt" else WandaPruningModifier
    return modifier(
        sparsity=0.5, mask_structure=settings["mask_structure"], targets=["Linear"], ignore=["re:.*lm_head"]
    )


class Bench:
    """Both sides of the comparison, and the one evaluation they share."""

    def __init__(self, data: Path, peer_python: Path, threads: int, folder: Path) -> None:
        from transformers import AutoTokenizer

        from tulle.text.reading import read_text, sequences

        self.model, self.peer_python, self.threads, self.folder = (
            data / "models/tinystories-656K",
            peer_python,
            threads,
            folder,
        )
        text = [data / "text/tinystories_10k.txt"]
        self.calibration = read_text(text, SEPARATOR, CALIBRATION, MIN_CHARS)
        self.evaluation = read_text(text, SEPARATOR, EVALUATION, MIN_CHARS)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.sequences = [ids.tolist() for ids in sequences(self.calibration, tokenizer, LENGTH)]

    def perplexity(self, folder: Path, weights: Path | None = None) -> float:
        """Of the model in ``folder``, with its linears replaced by the tensors of the file ``weights`` if given."""
        from safetensors.torch import load_file

        from tulle.evaluate.loading import load_model
        from tulle.evaluate.perplexity import evaluate_text
        from tulle.evaluate.text import Protocol

        model, tokenizer = load_model(folder)
        if weights is not None:
            replaced = load_file(weights)
            unknown = model.load_state_dict(replaced, strict=False).unexpected_keys
            assert replaced and not unknown, f"the peer's tensors do not fit: {unknown}"
        return evaluate_text(model, tokenizer, self.evaluation, Protocol(length=LENGTH))["perplexity"]

    def ours(self, step: dict[str, Any], target: str) -> dict[str, float]:
        from tulle.compression.job import compress

        calibration = {"samples": len(self.sequences), "length": LENGTH, "target": target}
        with tempfile.TemporaryDirectory(dir=self.folder) as parent:
            output = Path(parent) / "model"
            recipe = {"name": "bench", "calibration": calibration, "steps": [step]}
            begun = time.perf_counter()
            report = compress(self.model, recipe, output, calibration=self.calibration)
            seconds = time.perf_counter() - begun
            totals = report["totals"]
            return {
                "perplexity": self.perplexity(output),
                "seconds": seconds,
                "bits_per_weight": totals["bits_per_weight"],
                "sparsity": totals["sparsity"],
            }

    def peer(self, settings: dict[str, Any]) -> dict[str, Any]:
        job, weights, result = (self.folder / name for name in ("job.json", "weights.safetensors", "result.json"))
        content = {"peer": settings, "sequences": self.sequences, "model": str(self.model), "threads": self.threads}
        job.write_text(json.dumps(content | {"weights": str(weights), "result": str(result)}))
        done = subprocess.run(
            [str(self.peer_python), __file__, "--peer-worker", str(job)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
        return {"perplexity": self.perplexity(self.model, weights)} | json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/tinystories-656K and text/tinystories_10k.txt")
    parser.add_argument("--peer-python", type=Path, help="interpreter that can import llmcompressor")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/peer_tinystories.json")
    parser.add_argument("--peer-worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer_worker:
        peer_worker(arguments.peer_worker)
        return
    if not arguments.data or not arguments.peer_python:
        parser.error("--data and --peer-python are required")

    import torch
    from rich.console import Console
    from rich.table import Table

    from tulle import machine

    torch.set_num_threads(arguments.threads)
    console = Console()
    table = Table("case", "llm-compressor", "paper", "layer", "dense", "stream", title="perplexity (seconds)")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data, arguments.peer_python, arguments.threads, Path(folder))
        dense = bench.perplexity(bench.model)
        console.print(f"dense: {dense:.4f}")
        result: dict[str, Any] = {
            "protocol": " ".join(str(__doc__).split("Protocol: ")[1].split("Every case")[0].split()),
            # Seconds of a machine with other work on it compare with nothing: the load says so.
            "machine": machine.describe() | {"threads": arguments.threads, "load_at_start": os.getloadavg()[0]},
            "dense": dense,
            "cases": {},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            case = CASES[name]
            runs = {
                "llm-compressor": bench.peer(case["peer"]),
                "paper": bench.ours(case["paper"], "layer"),
                **{target: bench.ours(case["step"], target) for target in ("layer", "dense", "stream")},
            }
            cells = [f"{run['perplexity']:.2f} ({run['seconds']:.1f})" for run in runs.values()]
            console.print(f"{name}: {', '.join(cells)}")
            table.add_row(name, *cells)
            result["cases"][name] = runs
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table)
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
