"""Memory and time of `tulle compress` on a large checkpoint of random weights.

    python benchmarks/compress_large.py --folder build/large [--shape 1.1b|7b|experts] [--recipe NAME|YAML] [--layers N]

Writes the checkpoint (bf16, a shard per block) unless it is there, then compresses it in a process of its own with 16 ×
512 calibration tokens and reports that process's peak resident size and the seconds of every stage, reading and writing
included. Shapes: 1.1b has 22 layers, d 2048, ffn 5632, 32/4 heads; 7b is Llama-2-7B's, 32 layers, d 4096, ffn 11008,
32/32 heads (13.5 GB); experts is a Qwen3-MoE of 8 layers, d 512, 64 experts of width 1024, four of them per token
(1.7 GB). Vocabulary 32000 in all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from tulle import machine
from tulle.models.checkpoint import write_index
from tulle.models.description import describe

SHAPES = {
    "1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
        "num_hidden_layers": 22,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "num_hidden_layers": 32,
    },
    "experts": {
        "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 2048, "moe_intermediate_size": 1024,
        "num_experts": 64, "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "num_hidden_layers": 8, "architectures": ["Qwen3MoeForCausalLM"],
    },
}  # fmt: skip
COMMON = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}
COMPRESS = """
import json, sys
from tulle.compression.job import compress
report = compress(
    sys.argv[1], sys.argv[2], sys.argv[3], samples=int(sys.argv[4]), length=int(sys.argv[5]), device=sys.argv[6]
)
wanted = ("recipe", "seconds", "blocks", "peak_memory_bytes", "totals", "calibration", "machine")
print(json.dumps({key: report[key] for key in wanted}))
"""


def write_checkpoint(folder: Path, shape: dict[str, Any], layers: int) -> None:
    """Random weights (σ = 0.02, norms 1), one shard per block."""
    folder.mkdir(parents=True)
    settings = COMMON | shape | {"num_hidden_layers": layers}
    config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
    model = describe(config.to_dict())
    generator = torch.Generator().manual_seed(0)
    parts = [{layer.prefix + k: s for k, s in layer.tensors().items()} for layer in model.layers]
    parts.append(dict(model.outer_tensors()))
    shards: dict[str, list[str]] = {}
    total = 0
    for number, part in enumerate(parts):
        tensors = {
            name: (torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in part.items()
        }
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shards[file] = sorted(tensors)
        total += sum(2 * t.numel() for t in tensors.values())
    write_index(folder, shards, total)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    # Last, so that an interrupted writer is noticed.
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recipe", default="w4a16-g128")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--layers", type=int, help="[the shape's]")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/compress_large.json"))
    settings = parser.parse_args()
    shape = SHAPES[settings.shape]
    layers = settings.layers or shape["num_hidden_layers"]
    model, output = settings.folder / f"dense-{settings.shape}-{layers}", settings.folder / "compressed"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        write_checkpoint(model, shape, layers)
    for stale in (output, output.with_name("compressed.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    arguments = [model, settings.recipe, output, str(settings.samples), str(settings.length), settings.device]
    run = subprocess.run(
        [sys.executable, "-c", COMPRESS, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"},  # as the command line sets it
    )
    result = json.loads(run.stdout.splitlines()[-1]) | {"shape": settings.shape, "layers": layers}
    result["machine"] |= machine.describe()
    table = Table(
        "stage",
        "seconds",
        title=f"{settings.recipe}, {settings.shape}, {layers} layers, {settings.samples} × {settings.length} tokens",
    )
    seconds = dict(result["seconds"])
    for stage, value in (seconds.pop("steps") | seconds).items():
        table.add_row(stage, f"{value:.1f}")
    Console().print(table)
    totals = result["totals"]
    sizes = f"file {totals['dense_bytes'] / 1e9:.2f} GB → {totals['packed_bytes'] / 1e9:.2f} GB"
    Console().print(f"peak resident {result['peak_memory_bytes'] / 1e9:.2f} GB, {sizes}")
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    settings.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
