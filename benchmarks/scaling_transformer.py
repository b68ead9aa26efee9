"""Scaling Transformers: dense and sparse layers at equal parameters and tokens, and what decoding costs in torch.

    python benchmarks/scaling_transformer.py train [--cells dense ff16 …] [--threads N]
    python benchmarks/scaling_transformer.py decode [--threads N]
    python benchmarks/scaling_transformer.py draw --pictures DIR

train: recipes/scaling-*.yaml as they stand: 1.1 M parameters, d 128, 3 layers; a run that was cut short goes on. Bits
per byte over the whole held-out text in windows of 256, with the choices of decoding (argmax), weights rounded to bf16.

decode: one token at a time in torch, float32, batch 1, random weights and inputs, N 64, S 16, 16 heads, 2 layers, no
head, after a prompt of 32 tokens; d_ff of the sparse layers such that parameters equal the dense ones with d_ff = 4·d.
Cases in turn, 5 rounds of 8 tokens, the fastest round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scaling_transformer.json"
RECIPES = ("dense", "ff64", "both", "ff16", "qkv", "ff32")
DECODE: dict[str, dict[str, Any]] = {
    "dense": {"ff_block": None, "qkv_modules": None},
    "ff64": {"ff_block": 64, "qkv_modules": None},
    "qkv": {"ff_block": None, "qkv_modules": 16},
    "both": {"ff_block": 64, "qkv_modules": 16},
}
WIDTHS = (512, 1024, 2048, 4096)
LAYERS, PROMPT, ROUNDS, TOKENS = 2, 32, 5, 8


def train(name: str, folder: Path) -> dict[str, Any]:
    """One recipe: its model, held-out bits per byte, and the curve as [tokens, training loss, bits per byte]."""
    from tulle.training.curve import read_metrics
    from tulle.training.launch import train as run

    out = folder / name
    share_data(folder / "data", out / "data")
    run(ROOT / f"recipes/scaling-{name}.yaml", out, resume=True)
    if not (folder / "data").exists():
        os.rename(out / "data", folder / "data")
    record = json.loads((out / "run.json").read_text())
    rows = read_metrics(out / "metrics.jsonl")
    return {
        "model": record["recipe"]["model"],
        "parameters": parameters(out),
        "tokens": record["tokens_seen"],
        "bits_per_byte": record["held_out_bits_per_byte"],
        "curve": [[row["tokens"], row["loss"], row["held_out_bits_per_byte"]] for row in rows],
    }


def share_data(shared: Path, own: Path) -> None:
    """The six recipes read the same tokens; the first run has made them."""
    if shared.exists() and not own.exists():
        own.mkdir(parents=True)
        for file in shared.iterdir():
            os.link(file, own / file.name)


def parameters(folder: Path) -> int:
    """Of a model folder."""
    from transformers import AutoConfig

    from tulle.models.scaling_transformer import parameter_count

    return parameter_count(AutoConfig.from_pretrained(folder))


def train_cells(arguments: argparse.Namespace, cells: Cells) -> None:
    """Every recipe that is not there yet."""
    import tulle.training.launch  # noqa: F401 (now: a long run must not meet an edited source later)

    for name in arguments.cells:
        print(name, flush=True)
        found = cells.make(f"train/{name}", partial(train, name, arguments.folder))
        print(f"{name}: {found['parameters']:,} parameters, {found['bits_per_byte']:.4f} bits per byte", flush=True)


def decoder(d: int, case: dict[str, Any]) -> Any:
    """Layers of width ``d`` with a vocabulary that costs nothing."""
    import torch

    from tulle.models.scaling_transformer import (
        ScalingTransformerConfig,
        ScalingTransformerModel,
        matching_intermediate_size,
    )

    shape = {"vocab_size": 8, "hidden_size": d, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
    dense = ScalingTransformerConfig(**shape, **DECODE["dense"], intermediate_size=4 * d)
    config = ScalingTransformerConfig(**shape, **case, intermediate_size=case["ff_block"] or 1)
    if config.ff_block is None and config.qkv_modules is None:
        config = dense
    else:
        config.intermediate_size = matching_intermediate_size(config, dense)
    with torch.device("meta"):
        model = ScalingTransformerModel(config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    noise = torch.randn(1 << 20) / d**0.5  # drawn once: a billion draws would take longer than the measurement
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(noise)):
            part.copy_(noise[: len(part)])
    model.rotary_emb = type(model.rotary_emb)(config)
    return model.eval()


def decode(d: int, rounds: int) -> dict[str, Any]:
    """Case → seconds per token and layer, parameters per layer."""
    import torch

    models = {name: decoder(d, case) for name, case in DECODE.items()}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        hidden = torch.randn(rounds * TOKENS, 1, 1, d)
        caches = {
            name: model(inputs_embeds=torch.randn(1, PROMPT, d), use_cache=True).past_key_values
            for name, model in models.items()
        }
        best = dict.fromkeys(models, float("inf"))
        for rows in hidden.split(TOKENS):
            for name, model in models.items():
                began = time.perf_counter()
                for row in rows:
                    model(inputs_embeds=row, past_key_values=caches[name], use_cache=True)
                best[name] = min(best[name], (time.perf_counter() - began) / TOKENS)
    for name, model in models.items():
        count = sum(p.numel() for p in model.layers.parameters())
        found[name] = {
            "seconds_per_layer": best[name] / LAYERS,
            "parameters_per_layer": count // LAYERS,
            "d_ff": model.config.intermediate_size,
            "threads": torch.get_num_threads(),
        }
    return found


def decode_cells(arguments: argparse.Namespace, cells: Cells) -> None:
    """Every width that is not there yet."""
    for d in arguments.widths:
        found = cells.make(f"decode/{d}", partial(decode, d, ROUNDS))
        dense = found["dense"]["seconds_per_layer"]
        print(d, "  ".join(f"{k} {1e3 * v['seconds_per_layer']:.2f} ms ({dense / v['seconds_per_layer']:.1f}×)"
                           for k, v in found.items()), flush=True)  # fmt: skip


def draw(arguments: argparse.Namespace, cells: Cells) -> None:
    """Loss curves, and seconds per token against d, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    arguments.pictures.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in RECIPES:
        cell = cells.all.get(f"train/{name}")
        if cell is not None:
            label = f"{name}: {cell['bits_per_byte']:.3f}"
            axes.plot([t / 1e6 for t, _, _ in cell["curve"]], [b for _, _, b in cell["curve"]], label=label)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("held-out bits per byte")
    axes.legend(title="at the end")
    axes.grid(alpha=0.3)
    figure.savefig(arguments.pictures / "scaling_curves.png", dpi=110)

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    widths = sorted(int(key.split("/")[1]) for key in cells.all if key.startswith("decode/"))
    for name in DECODE:
        axes.loglog(
            widths, [1e3 * cells.all[f"decode/{d}"][name]["seconds_per_layer"] for d in widths], "o-", label=name
        )
    axes.set_xticks(widths, [str(d) for d in widths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("d")
    axes.set_ylabel("milliseconds per token and layer")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(arguments.pictures / "scaling_decode.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decode", "draw"))
    parser.add_argument("--cells", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--widths", nargs="*", type=int, default=list(WIDTHS))
    parser.add_argument("--folder", type=Path, default=Path("build/scaling"), help="for tokens and trained models")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    import torch

    from tulle import machine

    torch.set_num_threads(arguments.threads)
    cells = Cells(arguments.out, machine=machine.describe())
    {"train": train_cells, "decode": decode_cells, "draw": draw}[arguments.what](arguments, cells)


if __name__ == "__main__":
    main()
