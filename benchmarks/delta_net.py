"""Speed of a Qwen 3.5 shape with random int4 weights beside llama.cpp's Q4_0 of the same shape, interleaved.

    python benchmarks/delta_net.py decode|prefill [--peer-python PY] [--shape 0.8b] [--rounds 7] [--threads 2]

The shape is that of Qwen3.5-0.8B: 24 layers, three of gated delta nets (16 heads of 128 × 128) to one of gated
attention (8 heads of 256, 2 KV heads), d 1024, ffn 3584, a tied vocabulary of 248320. ``--shape small`` has 4 narrow
layers, to see that all of it runs. Files are written to build/delta_net once (0.8b: 6 GB). Every model lives in a
process of its own; a round times each of them once, in turn. Decode: 32 tokens after 16; prefill: 512 tokens. Prints a
table of medians, and writes results/delta_net_WHAT.json. PY: a Python with llama-cpp-python, built for this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from speed import COUNT, HERE, Worker  # noqa: E402
from synthetic import packed_linear, write_model  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "0.8b": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 32000,
    },
}  # fmt: skip
COMMON = {
    "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": True,
    "max_position_embeddings": 2048, "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
WAYS = {
    "": "as quantised:auto:int8", ", 8-bit inputs": "int8:auto:int8", ", 8-bit inputs, int4 head": "int8:auto:int4",
}  # fmt: skip
PEER = "llama.cpp Q4_0"


def new_gguf(path: Path, arch: str, s: dict[str, Any]) -> Any:
    """A writer that knows what all shapes have, tensors not."""
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(2048)
    writer.add_embedding_length(s["hidden_size"])
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_head_count(s["num_attention_heads"])
    writer.add_head_count_kv(s["num_key_value_heads"])
    writer.add_key_length(s["head_dim"])
    writer.add_value_length(s["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000_000.0)
    writer.add_vocab_size(s["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(s["vocab_size"])])
    writer.add_token_scores([0.0] * s["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * s["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    return writer


def finish_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, s: dict[str, Any]) -> None:
    """The same shape for llama.cpp, random, in F32."""
    arch = "qwen35"
    writer = new_gguf(path, arch, s)
    keys, values = (
        s["linear_num_key_heads"] * s["linear_key_head_dim"],
        s["linear_num_value_heads"] * s["linear_value_head_dim"],
    )
    writer.add_feed_forward_length(s["intermediate_size"])
    writer.add_rope_dimension_count(s["head_dim"] // 4)
    writer.add_rope_dimension_sections([s["head_dim"] // 8, 0, 0, 0])
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(values)
    writer.add_ssm_state_size(s["linear_key_head_dim"])
    writer.add_ssm_time_step_rank(s["linear_num_value_heads"])
    writer.add_ssm_group_count(s["linear_num_key_heads"])
    writer.add_uint32(f"{arch}.full_attention_interval", 4)
    generator = np.random.default_rng(0)
    d, f, heads = s["hidden_size"], s["intermediate_size"], s["linear_num_value_heads"]
    q, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]

    def random(*shape: int) -> np.ndarray:
        return 0.02 * generator.standard_normal(shape, np.float32)

    def ones(size: int) -> np.ndarray:
        return np.ones(size, np.float32)

    every = {
        "attn_norm.weight": ones(d), "post_attention_norm.weight": ones(d), "ffn_gate.weight": random(f, d),
        "ffn_up.weight": random(f, d), "ffn_down.weight": random(d, f),
    }  # fmt: skip
    attention = {
        "attn_q.weight": random(2 * q, d), "attn_k.weight": random(kv, d), "attn_v.weight": random(kv, d),
        "attn_output.weight": random(d, q), "attn_q_norm.weight": ones(s["head_dim"]),
        "attn_k_norm.weight": ones(s["head_dim"]),
    }  # fmt: skip
    delta = {
        "attn_qkv.weight": random(2 * keys + values, d), "attn_gate.weight": random(values, d),
        "ssm_beta.weight": random(heads, d), "ssm_alpha.weight": random(heads, d), "ssm_a": -ones(heads),
        "ssm_dt.bias": ones(heads), "ssm_conv1d.weight": random(2 * keys + values, 4),
        "ssm_norm.weight": ones(s["linear_value_head_dim"]),
        "ssm_out.weight": random(d, values),
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", random(s["vocab_size"], d))
    for i in range(s["num_hidden_layers"]):
        for name, tensor in (every | (attention if i % 4 == 3 else delta)).items():
            writer.add_tensor(f"blk.{i}.{name}", tensor)
    writer.add_tensor("output_norm.weight", ones(d))
    finish_gguf(writer)


class Family(NamedTuple):
    """What is timed: the configs' common part and the shapes' own, and who writes a shape for llama.cpp."""

    name: str
    common: dict[str, Any]
    shapes: dict[str, dict[str, Any]]
    write_gguf: Callable[[Path, dict[str, Any]], None]


def workers(family: Family, arguments: argparse.Namespace) -> tuple[dict[str, Worker], dict[str, str]]:
    """Running models by name, and why others do not run."""
    folder, shape = arguments.folder / arguments.shape, family.shapes[arguments.shape]
    if not (folder / "int4" / "config.json").exists():
        config = family.common | shape
        write_model(folder / "int4", config, lambda generator, _, size: packed_linear(generator, size, 4, 0.0, None))
    wanted = [
        (f"tulle int4{way}", sys.executable, ["tulle", str(folder / "int4"), str(arguments.threads), option])
        for way, option in WAYS.items()
    ]
    if arguments.peer_python:
        f32 = folder / "F32.gguf"
        if not f32.exists():
            family.write_gguf(f32, shape)
        command = [arguments.peer_python, str(HERE / "gguf_model.py"), str(folder), "{}", "--kinds", "Q4_0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted.append((PEER, arguments.peer_python, ["llama.cpp", str(folder / "Q4_0.gguf"), str(arguments.threads)]))
    found: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    for name, python, command in wanted:
        try:
            found[name] = Worker(python, *command)
        except (RuntimeError, OSError) as error:
            missing[name] = str(error)
        print(f"{name}: {missing.get(name, 'ready')}", flush=True)
    return found, missing


def compare(family: Family, description: str | None, file: str) -> None:
    """The whole benchmark; ``file``: of the folders and results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COUNT))
    parser.add_argument("--folder", type=Path, default=Path("build") / file)
    parser.add_argument("--shape", choices=family.shapes, default=next(iter(family.shapes)))
    parser.add_argument("--peer-python")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from tulle import machine

    running, missing = workers(family, arguments)
    count = COUNT[arguments.what]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(arguments.rounds + 1):  # the first one warms up
        for name, worker in running.items():
            taken = worker.time(arguments.what, count)
            if number:
                seconds[name].append(taken)
    for worker in running.values():
        worker.process.kill()
    results: dict[str, Any] = {}
    table = Table("", "tokens/s", f"× {PEER}", "MB", title=f"{arguments.what}, {family.name} {arguments.shape}")
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        ratio = rate / rates[PEER] if PEER in rates else None
        results[name] = {
            "tokens_per_s": rate, "best": count / min(seconds[name]), "worst": count / max(seconds[name]),
            "bytes": running[name].bytes, f"over {PEER}": ratio,
        }  # fmt: skip
        size = f"{running[name].bytes / 1e6:.0f}"
        table.add_row(name, f"{rate:.1f}", "" if ratio is None else f"{ratio:.2f}", size)
    Console(width=120).print(table)
    content = {
        "machine": machine.describe() | {"threads": arguments.threads}, "shape": family.shapes[arguments.shape],
        "rounds": arguments.rounds, "tokens": count, "results": results, "missing": missing,
    }  # fmt: skip
    out = arguments.out or HERE / f"results/{file}_{arguments.what}.json"
    out.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    compare(Family("Qwen 3.5 shape", COMMON, SHAPES, write_gguf), __doc__, "delta_net")


if __name__ == "__main__":
    main()
