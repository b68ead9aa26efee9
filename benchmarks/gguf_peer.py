"""A GGUF file in Tulle and in llama.cpp: greedy tokens, perplexity, decode speed.

    python benchmarks/gguf_peer.py --gguf FILE --peer-python PYTHON [--dense FOLDER] [--text FILE] [--threads N]

PYTHON is the interpreter of a virtual environment with llama-cpp-python in it. FOLDER is the dequantised model, as
``tulle export FILE --to dense`` writes it (made, if it is not given). Three things are measured:

* **Tokens.** Ten prompts, 64 greedy tokens each, both from the same token ids; the ids are compared, too. Where tokens
  differ first, the gap between the two tokens' logits, in each program: llama.cpp rounds the inputs of every linear to
  8 bits, Tulle to 16, so that tokens whose logits lie close may change places. A third run is llama.cpp on the
  dequantised weights (F16 or F32), which rounds no inputs.
* **Perplexity** of a text: Tulle's engine on the file beside transformers in float32 on the folder.
* **Speed.** Decoding after a prompt of 32 tokens, in turn, medians. Tulle with inputs of 16 bits and of 8.

Prints a table; writes results/gguf_peer.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three most important inventions of the 20th century are",
    "Q: What is the boiling point of water?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "In machine learning, gradient descent is",
    "Die Hauptstadt von Deutschland ist",
    "1, 1, 2, 3, 5, 8, 13,",
    "To make a good cup of tea, first",
)
TOKENS, GAP = 64, 1e-2

PEER = r"""
import ctypes, json, sys, time
import numpy as np
import llama_cpp

model = None
for line in sys.stdin:
    job = json.loads(line)
    what, answer = job["do"], None
    if what == "load":
        model = llama_cpp.Llama(job["file"], n_ctx=job["context"], n_threads=job["threads"],
                                n_threads_batch=job["threads"], verbose=False)
        answer = {"version": llama_cpp.__version__, "vocabulary": model.n_vocab()}
    elif what == "tokenize":
        answer = model.tokenize(job["text"].encode(), add_bos=job["bos"], special=True)
    else:
        def logits():
            found = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (model.n_vocab(),)).copy()
        model.reset()
        model._ctx.kv_cache_clear() if hasattr(model._ctx, "kv_cache_clear") else None
        model.eval(job["tokens"])
        if what == "logits":
            row = logits()
            answer = [float(row[t]) for t in job["of"]]
        else:
            begun, made = time.perf_counter(), []
            for _ in range(job["count"]):
                made.append(int(logits().argmax()))
                model.eval([made[-1]])
            answer = {"tokens": made, "seconds": time.perf_counter() - begun}
    print("@" + json.dumps(answer), flush=True)
"""


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, file: Path, threads: int, context: int):
        self._process = subprocess.Popen(
            [python, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.facts = self.ask(do="load", file=str(file), threads=threads, context=context)

    def ask(self, **job: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError("llama.cpp's process ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare_tokens(engine: Any, peer: Peer) -> list[dict[str, Any]]:
    """Per prompt: whether token ids and 64 greedy tokens agree, and the gap of logits where they first do not."""
    found = []
    for prompt in PROMPTS:
        ids = engine.text.encode(prompt)
        bos = bool(ids) and ids[0] == engine.config.get("bos_token_id")
        row: dict[str, Any] = {"prompt": prompt, "same_ids": ids == peer.ask(do="tokenize", text=prompt, bos=bos)}
        ours = engine.generate(ids, TOKENS, ignore_end=True).tokens
        theirs = peer.ask(do="greedy", tokens=ids, count=TOKENS)["tokens"]
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        row |= {"same_tokens": at is None, "first_difference": at, "gaps": None}
        if at is not None:
            context, pair = [*ids, *ours[:at]], [ours[at], theirs[at]]
            mine = engine.forward(context, 0, 0, [len(context) - 1])[0]
            other = peer.ask(do="logits", tokens=context, of=pair)
            row["gaps"] = [abs(float(mine[pair[0]] - mine[pair[1]])), abs(other[0] - other[1])]
        row["passes"] = at is None or min(row["gaps"]) < GAP
        found.append(row)
    return found


def perplexities(file: Path, dense: Path, text: str | None, threads: int) -> dict[str, float]:
    """Of the engine on the file, and of transformers in float32 on the folder."""
    import torch

    from tulle.evaluate import Protocol, evaluate_text, held_out_text
    from tulle.evaluate.engine import load_engine
    from tulle.evaluate.loading import load_model
    from tulle.evaluate.text import read_documents

    torch.set_num_threads(threads)
    protocol = Protocol(512, True)
    passage = read_documents(text) if text else held_out_text()[0]
    found = {}
    for name, loaded in (("engine", load_engine(file, threads=threads)), ("torch", load_model(dense))):
        found[name] = float(evaluate_text(*loaded, passage, protocol)["perplexity"])
    return found


def decode_speed(engines: dict[str, Any], peer: Peer, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each, in turn; a first round warms up."""
    from tulle.engine.bench import time_in_turn

    ids = [i * 7919 % peer.facts["vocabulary"] for i in range(32)]
    found: dict[str, list[float]] = {name: [] for name in (*engines, "llama.cpp")}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            ((_, seconds),) = time_in_turn([engine], len(ids), TOKENS, 1)[0]
            if number:
                found[name].append(1 / seconds)
        seconds = peer.ask(do="greedy", tokens=ids, count=TOKENS)["seconds"]
        if number:
            found["llama.cpp"].append(TOKENS / seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=[], choices=["tokens", "exact", "perplexity", "speed"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gguf_peer.json")
    options = parser.parse_args()
    from tulle.engine import Engine
    from tulle.export import export

    result: dict[str, Any] = {"file": options.gguf.name, "threads": options.threads, "cores": os.cpu_count()}
    context = 512
    with tempfile.TemporaryDirectory() as scratch:
        dense = options.dense
        if dense is None:
            dense = Path(scratch) / "dense"
            export(options.gguf, "dense", dense)
        engine = Engine(options.gguf, threads=options.threads, context=context)
        peer = Peer(options.peer_python, options.gguf, options.threads, context)
        result["llama_cpp_python"] = peer.facts["version"]
        if "tokens" not in options.skip:
            rows = result["tokens"] = compare_tokens(engine, peer)
            show("llama.cpp on the same file", rows)
        if "exact" not in options.skip:
            export(dense, "gguf", Path(scratch) / "plain.gguf")
            plain = Peer(options.peer_python, Path(scratch) / "plain.gguf", options.threads, context)
            rows = result["tokens_of_dequantised"] = compare_tokens(engine, plain)
            plain.close()
            show("llama.cpp on the dequantised weights", rows)
        if "perplexity" not in options.skip:
            found = result["perplexity"] = perplexities(options.gguf, dense, options.text, options.threads)
            share = found["engine"] / found["torch"] - 1
            print(f"perplexity: engine {found['engine']:.4f}, torch {found['torch']:.4f}, {share:+.3%} (within 0.1 %)")
        if "speed" not in options.skip:
            engines = {
                "Tulle, inputs of 16 bits": engine,
                "Tulle, inputs of 8 bits": Engine(
                    options.gguf, threads=options.threads, context=context, activations="int8"
                ),
            }
            speeds = decode_speed(engines, peer, options.rounds)
            result["decode_tokens_per_s"] = speeds
            base = statistics.median(speeds["llama.cpp"])
            for name, one in speeds.items():
                middle = statistics.median(one)
                print(f"{name:<26} {middle:8.1f} tokens/s  {middle / base:5.2f}×  ({min(one):.1f} to {max(one):.1f})")
        peer.close()
    result["seconds_since_epoch"] = int(time.time())
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(options.output, file=sys.stderr)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"{title}: {sum(r['passes'] for r in rows)} of {len(rows)} prompts agree or differ by less than {GAP:g}")
    for row in rows:
        gaps = "" if row["gaps"] is None else " gaps " + ", ".join(f"{gap:.4f}" for gap in row["gaps"])
        where = "same" if row["same_tokens"] else f"differ at {row['first_difference']}"
        print(f"  {row['prompt'][:32]!r:<36} ids {'same' if row['same_ids'] else 'DIFFER'}, tokens {where}{gaps}")
    widest = max((min(r["gaps"]) for r in rows if r["gaps"]), default=0.0)
    print(f"  widest gap {np.round(widest, 4)}")


if __name__ == "__main__":
    main()
