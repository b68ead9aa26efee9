"""Decode or prefill speed on the 1.1 B shape, ours beside llama.cpp and PyTorch: one run, interleaved, medians.

    python benchmarks/speed.py decode|prefill [--peer-python PY] [--rounds 7] [--threads 2]

Random weights of the shape of TinyLlama-1.1B (22 layers, d 2048, ffn 5632, 32/4 heads, vocabulary 32000), as
checkpoints of every format under build/speed. Every model lives in a process of its own; a round times each of them
once, in turn. Decode: 32 tokens after 16; prefill: 512 tokens. Reported are medians of tokens/s, ratios to Q4_0
and F32 (decode) or torch in float32 (prefill), bytes that a token reads, and those per second beside what as many
threads reach that only read. A peer that cannot be run is named as such. ``--peer-python``: a Python with
llama-cpp-python (built from source, for this machine) and gguf. ``--onnx-python``: one with onnxruntime-genai, and
``--onnx-models``: what ``python -m onnxruntime_genai.models.builder -i CHECKPOINT -o int4 -p int4 -e cpu
--extra_options int4_accuracy_level=4 int4_block_size=32`` wrote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from compress_large import COMMON, SHAPES  # noqa: E402
from synthetic import write_packed  # noqa: E402

HERE = Path(__file__).parent
FORMATS: dict[str, tuple[int | None, float]] = {
    "bf16": (None, 0.0), "bf16 70 %": (None, 0.7), "int8": (8, 0.0), "int8 50 %": (8, 0.5), "int8 70 %": (8, 0.7),
    "int4": (4, 0.0), "int4 50 %": (4, 0.5), "int4 70 %": (4, 0.7), "int4 80 %": (4, 0.8),
}  # fmt: skip


class Format(NamedTuple):
    """Bits, zeros, inputs that Top-K leaves out in front of every linear of the decoder, so many at a time, but where
    the name holds ``spared``; ternary ones have 8-bit inputs."""

    bits: int
    zeros: float = 0.0
    dropped: float = 0.0
    unit: int = 1
    spared: str | None = None


INPUTS = {
    "int4": Format(4), "int4, 30 % of inputs dropped": Format(4, dropped=0.3),
    "int4, 50 % of inputs dropped": Format(4, dropped=0.5),
    "int4, 50 % of inputs dropped, down reads all": Format(4, dropped=0.5, spared="down"),
    "int4, 50 % of inputs dropped by fours": Format(4, dropped=0.5, unit=4),
    "int4 70 %, 50 % of inputs dropped by fours": Format(4, 0.7, 0.5, 4),
    "int4 70 %": Format(4, 0.7), "int4 70 %, 50 % of inputs dropped": Format(4, 0.7, 0.5),
    "int8, 50 % of inputs dropped": Format(8, dropped=0.5),
    "ternary": Format(2), "ternary, 40 % of inputs dropped": Format(2, dropped=0.4),
    "ternary, 60 % of inputs dropped": Format(2, dropped=0.6),
    "ternary, 60 % of inputs dropped by fours": Format(2, dropped=0.6, unit=4),
}  # fmt: skip
LLAMA = ("F32", "BF16", "Q8_0", "Q4_0")
COUNT = {"decode": 32, "prefill": 512}


class Worker:
    """A model in a process."""

    def __init__(self, python: str, *arguments: str):
        self.process = subprocess.Popen(
            [python, str(HERE / "speed_worker.py"), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, errors = self.process.communicate()
            raise RuntimeError((errors.strip().splitlines() or ["it ended"])[-1])
        self.bytes = int(json.loads(line)["bytes"])

    def time(self, what: str, count: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what} {count}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def sparse_inputs(folder: Path, threads: str, only: list[str]) -> list[tuple[str, str, list[str]]]:
    """What runs of INPUTS: dense inputs in tiles, the others input-major and, to see what that is worth, in tiles. A
    model is made where one of its ways runs."""
    wanted = []
    for name, (bits, sparsity, dropped, unit, spared) in INPUTS.items():
        layout = "input-major" if dropped or bits == 2 else "sparse"
        ways = {"8-bit inputs": f"int8:{layout}"}
        if bits != 2:
            ways[""] = f"as quantised:{layout}"
        if unit == 4 or (not dropped and not sparsity):
            ways["8-bit inputs, int4 head"] = f"int8:{layout}:int4"
        if dropped == 0.5 and bits == 4 and unit == 1 and spared is None:
            if sparsity:
                ways["8-bit inputs, densified"] = "int8:dense input-major"
            else:
                ways["8-bit inputs, in tiles"] = "int8:sparse"
        labels = {f"tulle {name}" + (f", {way}" if way else ""): option for way, option in ways.items()}
        labels = {k: v for k, v in labels.items() if not only or any(part in k for part in only)}
        made = folder / name.replace(" ", "").replace("%", "").replace(",", "-")
        if labels and not (made / "config.json").exists():
            write_packed(made, "1.1b", bits, sparsity, 8 if bits == 2 else None, None, dropped, unit, spared)
        wanted += [(label, sys.executable, ["tulle", str(made), threads, option]) for label, option in labels.items()]
    return wanted


def workers(arguments: argparse.Namespace) -> tuple[dict[str, Worker], dict[str, str]]:
    """Running models by name, and why others do not run."""
    folder, threads = arguments.folder, str(arguments.threads)
    wanted: list[tuple[str, str, list[str]]] = []
    if arguments.inputs:
        wanted += sparse_inputs(folder, threads, arguments.only or [])
    for name, (bits, sparsity) in {} if arguments.inputs else FORMATS.items():
        if arguments.only and not any(part in f"tulle {name}, 8-bit inputs, densified" for part in arguments.only):
            continue  # nothing of it will run
        made = folder / name.replace(" ", "").replace("%", "")
        if not (made / "config.json").exists():
            write_packed(made, "1.1b", bits, sparsity)
        wanted.append((f"tulle {name}", sys.executable, ["tulle", str(made), threads, "as quantised:sparse"]))
        if bits is not None:
            wanted.append((f"tulle {name}, 8-bit inputs", sys.executable, ["tulle", str(made), threads, "int8:sparse"]))
        if name == "int4 70 %":
            wanted.append(
                (f"tulle {name}, densified", sys.executable, ["tulle", str(made), threads, "as quantised:dense"])
            )
    if arguments.peer_python:
        gguf = folder / "gguf"
        subprocess.run(
            [arguments.peer_python, str(HERE / "gguf_model.py"), str(gguf), json.dumps(COMMON | SHAPES["1.1b"])],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for kind in LLAMA:
            wanted.append(
                (f"llama.cpp {kind}", arguments.peer_python, ["llama.cpp", str(gguf / f"{kind}.gguf"), threads])
            )
    for path in arguments.onnx_models:
        embedding = 4 * COMMON["vocab_size"] * SHAPES["1.1b"]["hidden_size"]  # its builder leaves it in float32
        command = ["onnxruntime", str(path), threads, str(embedding)]
        wanted.append((f"onnxruntime {path.name}", arguments.onnx_python or sys.executable, command))
    shape = json.dumps(COMMON | SHAPES["1.1b"])
    for dtype in ("float32", "bfloat16", "int8") if arguments.what == "prefill" else ("bfloat16",):
        wanted.append((f"torch {dtype}", sys.executable, ["torch", shape, threads, dtype]))
    found: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    for name, python, command in wanted:
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        try:
            found[name] = Worker(python, *command)
        except (RuntimeError, OSError) as error:
            missing[name] = str(error)
        print(f"{name}: {missing.get(name, 'ready')}", flush=True)
    return found, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COUNT))
    parser.add_argument("--folder", type=Path, default=Path("build/speed"))
    parser.add_argument("--peer-python")
    parser.add_argument("--onnx-python")
    parser.add_argument("--onnx-models", type=Path, nargs="*", default=[], help="folders that its model builder made")
    parser.add_argument("--inputs", action="store_true", help="the formats whose tokens leave inputs out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="models whose names contain one of these")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from tulle import _native, machine

    running, missing = workers(arguments)
    count = COUNT[arguments.what]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(arguments.rounds + 1):  # the first one warms up
        for name, worker in running.items():
            taken = worker.time(arguments.what, count)
            if number:
                seconds[name].append(taken)
    if arguments.inputs:
        for worker in running.values():
            worker.bytes = round(worker.time("read", 0))
    for worker in running.values():
        worker.process.kill()
    read = _native.read_bandwidth(1 << 29, arguments.threads, 5) / 1e9
    results: dict[str, Any] = {}
    for name, times in seconds.items():
        rate = count / statistics.median(times)
        results[name] = {
            "tokens_per_s": rate, "best": count / min(times), "worst": count / max(times), "bytes": running[name].bytes,
        }  # fmt: skip
        if arguments.what == "decode":
            results[name]["gb_s"] = rate * running[name].bytes / 1e9
    bases = ("llama.cpp Q4_0", "llama.cpp F32") if arguments.what == "decode" else ("torch float32", "torch bfloat16")
    table = Table("", "tokens/s", *[f"× {b}" for b in bases], "MB", "GB/s", title=f"{arguments.what}, 1.1 B shape")
    for name, found in results.items():
        for base in bases:
            if base in results:
                found[f"over {base}"] = found["tokens_per_s"] / results[base]["tokens_per_s"]
        ratios = [f"{found[f'over {b}']:.2f}" if f"over {b}" in found else "" for b in bases]
        rate = f"{found['gb_s']:.1f}" if "gb_s" in found else ""
        table.add_row(name, f"{found['tokens_per_s']:.1f}", *ratios, f"{found['bytes'] / 1e6:.0f}", rate)
    Console(width=120).print(table)
    print(f"read bandwidth of {arguments.threads} threads: {read:.1f} GB/s")
    content = {
        "machine": machine.describe() | {"threads": arguments.threads}, "rounds": arguments.rounds,
        "tokens": count, "read_gb_s": read, "results": results, "missing": missing,
    }  # fmt: skip
    out = arguments.out or HERE / f"results/{arguments.what}{'_inputs' * arguments.inputs}.json"
    out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
