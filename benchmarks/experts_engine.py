"""Speed of a Qwen 3 shape with experts and random int4 weights beside llama.cpp's Q4_0 of it, interleaved.

    python benchmarks/experts_engine.py decode|prefill [--peer-python PY] [--shape 4b] [--rounds 7] [--threads 2]

4.0 B parameters, of which a token reads 0.9 B: 24 layers, d 1536, 16 heads of 128, 4 KV heads, 64 experts of 512, 8 of
them per token, a tied vocabulary of 151936. ``--shape small`` has 2 narrow layers, to see that all of it runs. Files
are written to build/experts_engine once (4b: 15 GB, most of it the half-precision file that llama.cpp quantises).
Every model lives in a process of its own; a round times each of them once, in turn. Decode: 32 tokens after 16;
prefill: 512 tokens. Prints a table of medians, and writes results/experts_engine_WHAT.json. PY: a Python with
llama-cpp-python, built for this machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from delta_net import Family, compare, finish_gguf, new_gguf  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "4b": {
        "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "vocab_size": 151936,
    },
    "small": {
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "vocab_size": 32000,
    },
}  # fmt: skip
COMMON = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": True,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "norm_topk_prob": True, "rope_theta": 10_000_000.0,
}  # fmt: skip


def write_gguf(path: Path, s: dict[str, Any]) -> None:
    """The same shape for llama.cpp, random; all blocks hold the same numbers, matrices in half precision."""
    writer = new_gguf(path, "qwen3moe", s)
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_feed_forward_length(4 * s["moe_intermediate_size"])
    writer.add_expert_count(s["num_experts"])
    writer.add_expert_used_count(s["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(s["moe_intermediate_size"])
    generator = np.random.default_rng(0)
    d, f, experts, head = s["hidden_size"], s["moe_intermediate_size"], s["num_experts"], s["head_dim"]
    q, kv = s["num_attention_heads"] * head, s["num_key_value_heads"] * head

    def random(*shape: int) -> np.ndarray:
        return (0.02 * generator.standard_normal(shape, np.float32)).astype(np.float16)

    def ones(size: int) -> np.ndarray:
        return np.ones(size, np.float32)

    block = {
        "attn_norm.weight": ones(d), "attn_q.weight": random(q, d), "attn_k.weight": random(kv, d),
        "attn_v.weight": random(kv, d), "attn_output.weight": random(d, q), "attn_q_norm.weight": ones(head),
        "attn_k_norm.weight": ones(head), "ffn_norm.weight": ones(d),
        "ffn_gate_inp.weight": random(experts, d).astype(np.float32), "ffn_gate_exps.weight": random(experts, f, d),
        "ffn_up_exps.weight": random(experts, f, d), "ffn_down_exps.weight": random(experts, d, f),
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", random(s["vocab_size"], d))
    for i in range(s["num_hidden_layers"]):
        for name, tensor in block.items():
            writer.add_tensor(f"blk.{i}.{name}", tensor)
    writer.add_tensor("output_norm.weight", ones(d))
    finish_gguf(writer)


def main() -> None:
    compare(Family("Qwen 3 shape with experts", COMMON, SHAPES, write_gguf), __doc__, "experts_engine")


if __name__ == "__main__":
    main()
