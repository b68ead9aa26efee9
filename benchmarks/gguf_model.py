"""Runs in the peer's Python: GGUF files of a Llama shape with random weights, and their quantised forms.

    python benchmarks/gguf_model.py FOLDER SHAPE_JSON

Writes F32.gguf, then BF16.gguf, Q8_0.gguf and Q4_0.gguf by llama.cpp's own quantiser (output head and embedding in the
type that it chooses). An F32.gguf that is there is taken, of whatever architecture. Needs the packages gguf and
llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

KINDS = ("BF16", "Q8_0", "Q4_0")


def write_f32(path: Path, s: dict[str, int]) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(s["hidden_size"])
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_feed_forward_length(s["intermediate_size"])
    writer.add_head_count(s["num_attention_heads"])
    writer.add_head_count_kv(s["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(s["hidden_size"] // s["num_attention_heads"])
    writer.add_vocab_size(s["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(s["vocab_size"])])
    writer.add_token_scores([0.0] * s["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * s["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    d, f = s["hidden_size"], s["intermediate_size"]
    kv = d // s["num_attention_heads"] * s["num_key_value_heads"]
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return 0.02 * generator.standard_normal(shape, np.float32)

    block = {
        "attn_q": random(d, d), "attn_k": random(kv, d), "attn_v": random(kv, d), "attn_output": random(d, d),
        "ffn_gate": random(f, d), "ffn_up": random(f, d), "ffn_down": random(d, f),
    }  # fmt: skip
    ones = np.ones(d, np.float32)
    writer.add_tensor("token_embd.weight", random(s["vocab_size"], d))
    for i in range(s["num_hidden_layers"]):
        for name, tensor in block.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor)
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", random(s["vocab_size"], d))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: int) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    parameters.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if code:
        sys.exit(f"llama.cpp could not write {target} (code {code})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("shape", type=json.loads, help="keys of a Llama config.json, as JSON")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="of the quantised files")
    arguments = parser.parse_args()

    import llama_cpp

    folder, shape = arguments.folder, arguments.shape
    folder.mkdir(parents=True, exist_ok=True)
    f32 = folder / "F32.gguf"
    if not f32.exists():
        write_f32(f32, shape)
    for name in arguments.kinds:
        if not (folder / f"{name}.gguf").exists():
            quantise(f32, folder / f"{name}.gguf", getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"))


if __name__ == "__main__":
    main()
