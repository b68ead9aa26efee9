"""One model in a process of its own, timed on request. Runs in our Python or in a peer's.

    python benchmarks/speed_worker.py KIND PATH THREADS [OPTION]

KIND: tulle (OPTION: activations:layout), llama.cpp, onnxruntime, or torch (PATH: the shape as JSON; OPTION: float32,
bfloat16, int8). onnxruntime's OPTION: bytes of the embedding. Reads a line ``prefill N`` or ``decode N`` and answers
with a line: seconds. ``decode`` follows a prompt of 16 tokens. ``read 0``: bytes of weights that a token of the decode
runs so far read, of a model that leaves inputs out fewer than it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = 16


class Tulle:
    def __init__(self, path: str, threads: int, option: str):
        from tulle.engine import Engine

        activations, layout, *head = option.split(":")
        kind = head[0] if head else "int8"
        self.engine = Engine(path, threads, 1024, activations=activations, layout=layout, head=kind)
        self.bytes = self.engine.weight_bytes

    def run(self, tokens: list[int], position: int) -> None:
        self.engine.forward(tokens, 0, position, [len(tokens) - 1])


class LlamaCpp:
    def __init__(self, path: str, threads: int, option: str):
        import llama_cpp

        self.model = llama_cpp.Llama(
            path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.bytes = Path(path).stat().st_size

    def run(self, tokens: list[int], position: int) -> None:
        if position == 0:
            self.model.reset()
        self.model.eval(tokens)


class OnnxRuntime:
    """A folder that onnxruntime-genai's model builder made."""

    def __init__(self, path: str, threads: int, option: str):
        import onnxruntime_genai as genai

        self.genai = genai
        config = genai.Config(path)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = genai.Model(config)
        files = sum(file.stat().st_size for file in Path(path).glob("model.onnx*"))
        self.bytes = files - int(option)  # of the embedding a token reads one row

    def run(self, tokens: list[int], position: int) -> None:
        if position == 0:
            settings = self.genai.GeneratorParams(self.model)
            settings.set_search_options(max_length=1024, do_sample=False)
            self.generator = self.genai.Generator(self.model, settings)
            self.generator.append_tokens(tokens)
        self.generator.generate_next_token()  # runs the model on the token that it chose last


class Torch:
    def __init__(self, path: str, threads: int, option: str):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if option == "bfloat16" else torch.float32
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        self.model = LlamaForCausalLM(LlamaConfig(**json.loads(path))).eval()
        torch.set_default_dtype(before)
        self.bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if option == "int8":
            self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, dtype=torch.qint8)
            self.bytes //= 4
        self.torch, self.cache = torch, None

    def run(self, tokens: list[int], position: int) -> None:
        with self.torch.inference_mode():
            cache = None if position == 0 else self.cache
            found = self.model(self.torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.cache = found.past_key_values


def main() -> None:
    classes: dict[str, Callable[[str, int, str], Tulle | LlamaCpp | OnnxRuntime | Torch]] = {
        "tulle": Tulle, "llama.cpp": LlamaCpp, "onnxruntime": OnnxRuntime, "torch": Torch,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=classes)
    parser.add_argument("path")
    parser.add_argument("threads", type=int)
    parser.add_argument("option", nargs="?", default="")
    arguments = parser.parse_args()
    model = classes[arguments.kind](arguments.path, arguments.threads, arguments.option)
    print(json.dumps({"bytes": model.bytes}), flush=True)
    for line in sys.stdin:
        what, count = line.split()[0], int(line.split()[1])
        if what == "read":
            print(model.engine.take_bytes_per_token() if isinstance(model, Tulle) else model.bytes, flush=True)
            continue
        if what == "prefill":
            begun = time.perf_counter()
            model.run([i * 7919 % 31000 for i in range(count)], 0)
        else:
            model.run(list(range(1, PROMPT + 1)), 0)
            begun = time.perf_counter()
            for i in range(count):
                model.run([i * 7919 % 31000], PROMPT + i)
        print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    main()
