"""Scaling Transformers: dense and sparse layers at equal parameters and tokens, and what decoding costs in torch.

    python benchmarks/scaling_transformer.py train [--cells dense ff16 …] [--threads N]
    python benchmarks/scaling_transformer.py decode [--threads N]
    python benchmarks/scaling_transformer.py draw

train: those sources of the reference model's corpus that the package's own dependencies bring, its split, a tokenizer
of 1024 entries; d 128, 4 layers, 4 heads, dense d_ff 1024. Sparse: one unit in N of the feed-forward, controller rank
16 (the paper's in its 800M model), S 8 modules, d_ff such that parameters equal the dense model's. AdamW for all weights,
one learning rate, 8 × 256 tokens per step, the same windows in the same order; bf16 autocast over float32 weights. Bits
per byte over the whole held-out text in windows of 256, with the choices of decoding (argmax). Finished cells are kept.

decode: one layer and one token at a time in torch, float32, batch 1, random weights, cache of 64 tokens; the fastest of
several rounds. N 64, S 16, d_ff of the sparse layers such that parameters equal the dense layer's with 4·d.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells  # noqa: E402

RESULTS = Path(__file__).parent / "results/scaling_transformer.json"
CASES: dict[str, dict[str, Any]] = {
    "dense": {"ff_block": None, "qkv_modules": None},
    "ff64": {"ff_block": 64, "qkv_modules": None},
    "ff64+qkv": {"ff_block": 64, "qkv_modules": 8},
    "ff16": {"ff_block": 16, "qkv_modules": None},
    "qkv": {"ff_block": None, "qkv_modules": 8},
    "ff32": {"ff_block": 32, "qkv_modules": None},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "ff_lowrank": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONTEXT, BATCH, SEED = 256, 8, 0
SOURCES = {
    "stdlib": 1.0, "numpy": 1.0, "matplotlib": 1.0, "networkx": 1.0, "sympy": 0.5, "torch": 0.3, "transformers": 0.2,
    "accelerate": 1.0, "huggingface_hub": 1.0, "pydantic": 1.0, "typer": 1.0, "rich": 1.0, "jinja2": 1.0,
    "packaging": 1.0, "fsspec": 1.0, "tqdm": 1.0,
}  # fmt: skip
"""Distribution → weight, as in recipes/reference.yaml."""


def variant(shape: dict[str, Any], case: dict[str, Any]) -> Any:
    """The configuration of a case, its d_ff chosen so that its parameters equal those of the dense one."""
    from tulle.models.scaling_transformer import ScalingTransformerConfig, matching_intermediate_size

    dense = ScalingTransformerConfig(**(shape | CASES["dense"]))
    if case == CASES["dense"]:
        return dense
    block = case["ff_block"] or 1
    rough = ScalingTransformerConfig(**(shape | case | {"intermediate_size": block}))
    return ScalingTransformerConfig(**(shape | case | {"intermediate_size": matching_intermediate_size(rough, dense)}))


def optimizer_of(model: Any, rate: float) -> Any:
    """AdamW, weight decay on matrices and kernels alone."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def factor(step: int, steps: int, warmup: int = 100, decay: float = 0.25) -> float:
    """Warm-up, plateau, 1 − √t over the last quarter, on the peak learning rate."""
    start = steps - round(decay * steps)
    if step >= start:
        return 1 - math.sqrt((step - start + 1) / (steps - start + 1))
    return min(1.0, (step + 1) / (warmup + 1))


def train(case: dict[str, Any], corpus: Any, tokens: int, rate: float, save: Path | None) -> dict[str, Any]:
    """One run: parameters, d_ff, held-out bits per byte, and the curve as [tokens, training loss, bits per byte]."""
    import numpy as np
    import torch
    from torch.nn import functional

    from tulle.models.scaling_transformer import ScalingTransformerForCausalLM
    from tulle.train.held_out import bits_per_byte, estimate
    from tulle.train.tokens import Windows

    torch.manual_seed(SEED)
    config = variant(SHAPE, case)
    model = ScalingTransformerForCausalLM(config)
    windows = Windows(corpus.train, CONTEXT, SEED)
    optimizer = optimizer_of(model, rate)

    def loss_of(inputs: Any, targets: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    steps = tokens // (BATCH * CONTEXT)
    curve: list[list[float]] = []
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(step, steps)
        rows = torch.from_numpy(windows.batch(step * BATCH, BATCH))
        loss = loss_of(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            model.eval()
            bits = estimate(loss_of, corpus, CONTEXT, BATCH, 32)
            model.train()
            curve.append([(step + 1) * BATCH * CONTEXT, float(np.mean(losses)), bits])
            print(f"  {curve[-1][0]:>9,} tokens  loss {curve[-1][1]:.3f}  {bits:.3f} bits per byte", flush=True)
            losses = []
    seconds = time.perf_counter() - began
    if save is not None:
        from tulle.train.tokens import save_tokenizer

        model.save_pretrained(save)
        save_tokenizer(corpus.tokenizer, save, CONTEXT)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "d_ff": config.intermediate_size,
        "ff_block": config.ff_block,
        "qkv_modules": config.qkv_modules,
        "tokens": steps * BATCH * CONTEXT,
        "learning_rate": rate,
        "bits_per_byte": bits_per_byte(model, corpus, CONTEXT),
        "seconds": seconds,
        "curve": curve,
    }


def train_cells(arguments: argparse.Namespace, cells: Cells) -> None:
    """Every cell that is not there yet."""
    import tulle.models.scaling_transformer  # noqa: F401 (now: a long run must not meet an edited source later)
    from tulle.train.recipe import Data
    from tulle.train.tokens import prepare

    sources = [{"name": name, "weight": weight} for name, weight in SOURCES.items()]
    data = Data.model_validate({"sources": sources, "vocab_size": SHAPE["vocab_size"]})
    corpus = prepare(data, SEED, CONTEXT, arguments.folder / "data")
    for name in arguments.cells:
        print(name, flush=True)
        save = arguments.folder / name
        run = partial(train, CASES[name], corpus, arguments.tokens, arguments.learning_rate, save)
        print(f"{name}: {cells.make(f'train/{name}', run)['bits_per_byte']:.4f} bits per byte", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decode", "draw"))
    parser.add_argument("--cells", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=2_048_000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--folder", type=Path, default=Path("build/scaling"), help="for tokens and trained models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    import torch

    from tulle import machine

    torch.set_num_threads(arguments.threads)
    cells = Cells(arguments.out, machine=machine.describe() | {"threads": arguments.threads})
    {"train": train_cells}[arguments.what](arguments, cells)


if __name__ == "__main__":
    main()
