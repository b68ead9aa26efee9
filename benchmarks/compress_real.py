"""Compressing a real model: seconds and perplexity beside llm-compressor, in turns.

    python benchmarks/compress_real.py --model smollm2-permuted --data DATA --peer-python PEER/bin/python

GPTQ, 4 bits in groups of 64, the same calibration tokens for both. A round runs each side once, as a process of its
own with all threads; seconds are those of compressing (ours: as the report says, loading and writing included; the
peer's: its ``oneshot`` call alone). Medians of the rounds count. Perplexity is measured by one code for both:
``wiki.test.raw``, rows joined with a blank line, first 120,000 bytes, windows of 1024 tokens.

DATA holds ``text/calibration-wiki.txt`` and ``text/wiki.test.raw``. ``--samples 128 --length 2048 --rounds 1
--without-peer`` measures the long calibration.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peer_tinystories import peer_worker

GROUP = 64
EVALUATED = 120_000
"""Bytes of the test text."""
WINDOW = 1024


def evaluation_text(data: Path) -> str:
    rows = (data / "text/wiki.test.raw").read_text(encoding="utf-8").split("\n")
    return "\n\n".join(rows).encode()[:EVALUATED].decode(errors="ignore")


class Bench:
    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoTokenizer

        from tulle.text.reading import read_text, sequences

        self.given, self.folder = given, folder
        text = read_text([given.data / "text/calibration-wiki.txt"])
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        self.sequences = [ids.tolist() for ids in sequences(text, tokenizer, given.length, given.samples, 0)]
        (folder / "test.txt").write_text(evaluation_text(given.data), encoding="utf-8")

    def ours(self) -> dict[str, Any]:
        """One run of the command line, and what its report says."""
        given, out = self.given, self.folder / "ours"
        recipe = self.folder / "gptq.yaml"
        compute = {"compute": given.compute} if given.compute else {}
        content = {
            "calibration": {"samples": given.samples, "length": given.length} | compute,
            "steps": [{"gptq": {"bits": 4, "group_size": GROUP}}],
        }
        recipe.write_text(json.dumps(content))
        subprocess.run(["rm", "-rf", str(out), f"{out}.partial"], check=True)
        command = [str(Path(sys.executable).parent / "tulle"), "compress", str(given.model), "-r", str(recipe)]
        command += ["-o", str(out), "--calibration", str(given.data / "text/calibration-wiki.txt")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
        return {
            "seconds": report["seconds"]["total"],
            "parts": {k: v for k, v in report["seconds"].items() if k != "total"},
            "compute": report["compute"],
            "peak_memory_bytes": report["peak_memory_bytes"],
            "bytes": report["totals"]["packed_bytes"],
        }

    def peer(self) -> dict[str, Any]:
        job, weights, result = (self.folder / name for name in ("job.json", "weights.safetensors", "result.json"))
        content = {
            "peer": {"modifier": "gptq", "group_size": GROUP}, "sequences": self.sequences,
            "model": str(self.given.model), "threads": os.cpu_count(), "dtype": self.given.peer_dtype,
            "length": self.given.length, "weights": str(weights), "result": str(result),
        }  # fmt: skip
        job.write_text(json.dumps(content))
        command = [str(self.given.peer_python), __file__, "--peer-worker", str(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def perplexity(self, folder: Path, weights: Path | None = None) -> float:
        """Of the model in ``folder``, its linears replaced by the tensors of the file ``weights`` if given."""
        from safetensors.torch import load_file

        from tulle.evaluate.loading import load_model
        from tulle.evaluate.perplexity import evaluate_text
        from tulle.evaluate.text import Protocol, read_documents

        model, tokenizer = load_model(folder)
        if weights is not None:
            replaced = load_file(weights)
            unknown = model.load_state_dict(replaced, strict=False).unexpected_keys
            assert replaced and not unknown, f"the peer's tensors do not fit: {unknown}"
        text = read_documents(str(self.folder / "test.txt"))
        return float(evaluate_text(model, tokenizer, text, Protocol(length=WINDOW))["perplexity"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the dense model")
    parser.add_argument("--data", type=Path, help="folder with text/calibration-wiki.txt and text/wiki.test.raw")
    parser.add_argument("--peer-python", type=Path, help="interpreter that can import llmcompressor")
    parser.add_argument("--peer-dtype", default="bfloat16", help="the peer's model in this dtype")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--compute", choices=["auto", "float32", "bfloat16"], help="of our recipe")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="gptq64", help="entry in the results file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/compress_real.json")
    parser.add_argument("--peer-worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer_worker:
        return peer_worker(given.peer_worker)
    from tulle import machine

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        ours, peer = [], []
        for _ in range(given.rounds):
            ours.append(bench.ours())
            if not given.without_peer:
                peer.append(bench.peer())
            print(ours[-1]["seconds"], peer[-1]["seconds"] if peer else "", flush=True)
        found: dict[str, Any] = {
            "model": given.model.name, "samples": given.samples, "length": given.length, "machine": machine.describe(),
            "dense": {"perplexity": bench.perplexity(given.model)},
            "tulle": ours[-1] | {
                "rounds": [x["seconds"] for x in ours], "seconds": statistics.median(x["seconds"] for x in ours),
                "perplexity": bench.perplexity(Path(folder) / "ours"),
            },
        }  # fmt: skip
        if peer:
            found["llm-compressor"] = peer[-1] | {
                "dtype": given.peer_dtype,
                "rounds": [x["seconds"] for x in peer],
                "seconds": statistics.median(x["seconds"] for x in peer),
                "perplexity": bench.perplexity(given.model, Path(folder) / "weights.safetensors"),
            }
            found["ratio"] = found["tulle"]["seconds"] / found["llm-compressor"]["seconds"]
    print(json.dumps(found, indent=2))
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps(results | {given.name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
