"""Sparse activations: what they cost without training, and what training with them gives.

    python benchmarks/q_sparse.py free --data DIR          TEAL, WINA, budgets at 25, 40, 50 and 60 % of inputs dropped
    python benchmarks/q_sparse.py scratch                  three sizes from scratch: dense, Top-K, ReLU, no STE, b1.58
    python benchmarks/q_sparse.py law                      sizes × sparsities, and the law fitted on them
    python benchmarks/q_sparse.py continue                 the reference model trained on, at 40, 50 and 60 %
    python benchmarks/q_sparse.py gradients                by block of the deep models, straight through or not
    python benchmarks/q_sparse.py context                  what models of scratch have learnt to do with context
    python benchmarks/q_sparse.py picture                  loss curves of scratch, and what free found
    python benchmarks/q_sparse.py select                   milliseconds to find the K largest, beside a product

``free``: tinystories-656K (protocol of peer_tinystories.py) and the bundled reference model (calibrated on modules of
the standard library's training side, evaluated on the beginnings of its held-out modules). All tokens are sparse, the
prompt's too; every linear's inputs are, the head's are not.

``scratch``, ``law`` and ``continue`` train on the standard library by ``tulle train``; the loss is in nats per token of
its held-out modules. Overall sparsity is measured on them: the share of the decoder's weights that a token does not
read. Finished cells of the JSON are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, compressed, import_methods  # noqa: E402
from q_sparse_recipes import (
    CONTEXT,
    CONTINUED,
    DATA,
    LAW_SIZES,
    ROTATED,
    SCRATCH_METHODS,
    SIZES,
    continued_recipes,
    free_recipes,
    joint_recipes,
    q_sparse,
    rotated_recipe,
    scratch_recipe,
    untrained_recipes,
)  # noqa: E402

SHARES = (0.25, 0.4, 0.5, 0.6)
RESULTS = Path(__file__).parent / "results"


def free(data: Path | None, models: list[str], methods: list[str] | None, out: Path) -> None:
    from tulle import machine
    from w4a4 import SETTINGS, Bench

    import_methods()
    cells = Cells(out, machine=machine.describe())
    with tempfile.TemporaryDirectory() as scratch:
        for name in models:
            bench = Bench(name, data, Path(scratch), SETTINGS[name]["samples"])
            dense = cells.make(f"{name}/dense", lambda b=bench: {"perplexity": b.perplexity(b.model)})["perplexity"]
            print(f"{name}: dense {dense:.2f}", flush=True)
            for share in SHARES:
                for method, steps in free_recipes(share).items():
                    if methods is not None and method not in methods:
                        continue
                    cell = cells.make(f"{name}/{method}/{share}", lambda s=steps, b=bench: b.run(b.model, s, "layer"))
                    print(f"  {share:.0%} {method:18} {cell['perplexity']:8.2f}  {cell['seconds']:.0f} s", flush=True)
            for method, steps in joint_recipes().items():
                cell = cells.make(f"{name}/joint/{method}", lambda s=steps, b=bench: b.run(b.model, s, "stream"))
                print(f"  {method:32} {cell['perplexity']:8.2f}", flush=True)


LAW_SHARES = (0.0, 0.3, 0.5, 0.65, 0.8)
"""Dropped inputs of the runs that the law is fitted on; ReLU² adds zeros of its own."""


class Trainer:
    """Runs training recipes as cells; folders and one token cache lie in ``work``."""

    def __init__(self, cells: Cells, work: Path):
        self.cells, self.work = cells, work

    def run(self, key: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """The cell of a recipe: loss and bits per byte of held-out text, overall sparsity, the loss curve."""
        found: dict[str, Any] = self.cells.make(key, lambda: self._train(key, recipe))
        print(
            f"{key:32} loss {found['loss']:.4f}  {found['held_out_bits_per_byte']:.4f} bits per byte  "
            f"{found['sparsity']:.1%} of the weights not read  {found['seconds']:.0f} s",
            flush=True,
        )
        return found

    def folder(self, key: str) -> Path:
        return self.work / "".join(c if c.isalnum() or c in ".-" else "_" for c in key)

    def _train(self, key: str, recipe: dict[str, Any]) -> dict[str, Any]:
        from tulle.training.curve import read_metrics
        from tulle.training.launch import train

        begun, out = time.perf_counter(), self.folder(key)
        (self.work / "data").mkdir(parents=True, exist_ok=True)
        out.mkdir(exist_ok=True)
        if not (out / "data").exists():
            (out / "data").symlink_to((self.work / "data").resolve())
        train(recipe, out, resume=True, log=lambda line: None)
        seconds = time.perf_counter() - begun
        record = json.loads((sorted(out.glob("stages/*/run.json")) or [out / "run.json"])[-1].read_text())
        nats = record["held_out_bits_per_byte"] * math.log(2) * record["held_out_bytes"] / record["held_out_tokens"]
        return {
            "loss": nats,
            "held_out_bits_per_byte": record["held_out_bits_per_byte"],
            **self.read(out, recipe["training"]["context"]),
            "tokens": read_metrics(out / "metrics.jsonl")[-1]["tokens"],
            "seconds": seconds,
            "curve": [[row["tokens"], row["held_out_bits_per_byte"]] for row in read_metrics(out / "metrics.jsonl")],
            "zeros": read_metrics(out / "metrics.jsonl")[-1],
        }

    def read(self, out: Path, context: int) -> dict[str, Any]:
        """What a token of the held-out text reads of the decoder's weights."""
        from tulle.evaluate.loading import load_model
        from tulle.inspect.activity import measure_activity
        from tulle.text.standard_library import held_out_text

        model, tokenizer = load_model(out)
        texts = held_out_text()[:16]
        sequences = [tokenizer(text, return_tensors="pt").input_ids[0][:context] for text in texts]
        found = measure_activity(model, sequences)
        roles: dict[str, list[float]] = {}
        for row in found["rows"]:
            roles.setdefault(row["role"], []).append(row["sparsity"])
        return {
            "weights": found["total"]["weights"],
            "active": found["total"]["active"],
            "sparsity": found["total"]["sparsity"],
            "inputs": {role: sum(shares) / len(shares) for role, shares in roles.items()},
        }


def scratch(
    trainer: Trainer, sizes: list[str], names: list[str] | None, tokens: int, rate: float | None, seed: int
) -> None:
    end = (f", rate {rate:g}" if rate else "") + (f", seed {seed}" if seed else "")
    for size in sizes:
        for method in names or SCRATCH_METHODS:
            if method in ROTATED:
                recipe = rotated_recipe(size, tokens, ROTATED[method], seed)
            else:
                recipe = scratch_recipe(size, SCRATCH_METHODS[method], tokens, rate, seed)
            found = trainer.run(f"{size}/{method}{end}", recipe)
            dense = trainer.cells.all.get(f"{size}/dense{end}")
            if dense is not None:
                print(f"{'':32} {found['loss'] / dense['loss'] - 1:+.2%} of the dense loss", flush=True)


def law(trainer: Trainer, sizes: list[str], tokens: int, out: Path) -> None:
    from tulle.laws import Run, fit

    runs = []
    weights: dict[str, int] = {}  # N counts the zeros of ternary weights, as the paper's does
    for kind, before in (("full precision", []), ("1.58-bit", [{"bitnet": {}}])):
        for size in sizes:
            for share in LAW_SHARES:
                methods = [*before, q_sparse(share)]
                # The grid of scratch has some of these.
                key = f"{size}/{'b1.58 ' * bool(before)}Top-K {1 - share:.0%}".replace("%", " %")
                found = trainer.run(key, scratch_recipe(size, methods, tokens))
                run = {
                    "size": weights.setdefault(size, found["weights"]),
                    "sparsity": found["sparsity"],
                    "loss": found["loss"],
                    "weights": kind,
                }
                runs.append(run)
    out.write_text(json.dumps({"runs": runs}, indent=2) + "\n")
    for kind in dict.fromkeys(run["weights"] for run in runs):
        own = [Run(r["size"], r["sparsity"], r["loss"]) for r in runs if r["weights"] == kind]
        found = fit(own, 200)
        ends = found.interval(law.optimum for law in found.replicates)
        print(f"{kind}: {found.law}, best sparsity {found.law.optimum:.1%} ({ends[0]:.1%} to {ends[1]:.1%})")


def continued(trainer: Trainer, tokens: int, names: list[str] | None) -> None:
    """The reference model trained on, dense and sparse, as it is and in its principal components (LaRoSA)."""
    for method, steps in continued_recipes().items():
        if names is not None and method not in names:
            continue
        recipe = {
            "start": "reference",
            "data": DATA,
            "training": CONTINUED | {"tokens": tokens},
            "methods": steps,
        }
        if method.startswith("LaRoSA") and f"continue/{method}" not in trainer.cells.all:
            recipe["start"] = rotated(trainer)
        trainer.run(f"continue/{method}", recipe)
    for method, steps in untrained_recipes().items():
        if names is not None and method not in names:
            continue
        bits = trainer.cells.make(
            f"continue/{method}", lambda m=method, s=steps: without_training(trainer, m, s, tokens)
        )["held_out_bits_per_byte"]
        print(f"{method}: {bits:.4f} bits per byte", flush=True)


def rotated(trainer: Trainer) -> str:
    """The reference model with inputs in their principal components, which is what it computes and no more."""
    from tulle.models.hub import local_folder

    out = trainer.folder("reference, LaRoSA")
    recipe = {"steps": [{"larosa": {}}], "calibration": {"samples": 32, "length": CONTINUED["context"]}}
    compressed(local_folder("reference"), recipe, out, DATA, 0, 256, CONTINUED["context"], trainer.work)
    return str(out)


def without_training(trainer: Trainer, name: str, steps: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Steps on the dense model that was trained as long, calibrated on the training text."""
    start, out = trainer.folder("continue/dense"), trainer.folder(f"continue/{name}")
    context = CONTINUED["context"]
    recipe = {"steps": steps, "calibration": {"samples": 32, "length": context}}
    bits, _ = compressed(start, recipe, out, DATA, 0, 256, context, trainer.work)
    return {"held_out_bits_per_byte": bits, "tokens": tokens, **trainer.read(out, context)}


def gradients(trainer: Trainer, out: Path) -> None:
    """Norms of what reaches the linears of every block of the deep models, untrained and trained, straight through the
    mask and not, and the cosine between the two. Without straight-through it is the loss's own gradient."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from tulle.methods.train.q_sparse import QSparse
    from tulle.text.standard_library import held_out_text

    def by_block(folder: Path, share: float, straight: bool, trained: bool) -> list[torch.Tensor]:
        config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        make = AutoModelForCausalLM.from_pretrained if trained else AutoModelForCausalLM.from_config
        model = make(folder if trained else config)
        QSparse(share=share, activation="relu2", straight_through=straight).prepare(model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [text for text in held_out_text() if len(text) > 3000][:8]
        ids = torch.stack([tokenizer(text, return_tensors="pt").input_ids[0][:CONTEXT] for text in texts])
        model(ids, labels=ids).loss.backward()
        return [
            torch.cat([p.grad.flatten() for name, p in block.named_parameters() if "proj" in name])
            for block in model.model.layers
        ]

    cells = Cells(out)
    for name in ("Top-K 50 %", "Top-K 20 %"):
        for method in (name, f"{name}, no straight-through"):
            folder = trainer.folder(f"1M deep/{method}")
            share = SCRATCH_METHODS[method][0]["q_sparse"]["share"]
            for trained in (False, True):
                through, own = (by_block(folder, share, straight, trained) for straight in (True, False))
                cells.all[f"{method}, {'trained' if trained else 'untrained'}"] = found = {
                    "straight through": [float(g.norm()) for g in through],
                    "own": [float(g.norm()) for g in own],
                    "cosine": [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(through, own, strict=True)],
                }
                print(f"{method}, {'trained' if trained else 'untrained'}; blocks 0, 5, 10, 15")
                for what, values in found.items():
                    print(f"  {what:16} " + "  ".join(f"{v:7.3f}" for v in values[::5]), flush=True)
    cells.write()


SPANS = {"positions 1 to 15": (1, 16), "positions 64 to 255": (64, 256)}


def context(trainer: Trainer, source: Path, out: Path) -> None:
    """Loss by place in the window, of windows that begin anywhere: what context is worth to each model of ``source``
    whose folder is still there."""
    import torch

    from tulle.evaluate.loading import load_model
    from tulle.text.standard_library import held_out_text

    cells = Cells(out)
    torch.set_grad_enabled(False)
    windows = torch.empty(0, CONTEXT, dtype=torch.long)
    for key, cell in json.loads(source.read_text())["cells"].items():
        if not (trainer.folder(key) / "run.json").is_file():
            continue
        model, tokenizer = load_model(trainer.folder(key))
        if not len(windows):  # all models of the grid have one vocabulary
            ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in held_out_text()])
            windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)[:: max(1, len(ids) // CONTEXT // 512)]
        total = torch.zeros(CONTEXT - 1)
        for batch in windows.split(32):
            logits = model(batch).logits[:, :-1].transpose(1, 2)
            total += torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").sum(0)
        loss = total / len(windows)
        key = f"{key}, {cell['tokens'] / 1e6:.0f} M tokens"
        cells.all[key] = found = {name: float(loss[a - 1 : b - 1].mean()) for name, (a, b) in SPANS.items()}
        print(f"{key:48} " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)
    cells.write()


CURVES = {
    "dense": "-", "Top-K 70 %": "-", "Top-K 70 %, no straight-through": "--", "ReLU": ":", "b1.58 dense": "-",
    "b1.58 Top-K 70 %": "-",
}  # fmt: skip


def picture(cells: dict[str, Any], file: Path) -> None:
    """Held-out bits per byte over tokens, a panel per size."""
    from matplotlib.figure import Figure

    sizes = [size for size in LAW_SIZES if f"{size}/dense" in cells]
    figure = Figure(figsize=(4.2 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for size, axes in zip(sizes, panels, strict=True):
        for color, (name, style) in enumerate(CURVES.items()):
            cell = cells.get(f"{size}/{name}") or cells.get(f"{size}/{name.removeprefix('Top-K 70 %, ')}")
            if cell is None:
                continue
            rows = cell["curve"]
            axes.plot(
                [t / 1e6 for t, _ in rows],
                [bits for _, bits in rows],
                style,
                label=name,
                linewidth=1.4,
                color=f"C{color}",
            )
        low = min(bits for key, cell in cells.items() if key.startswith(f"{size}/") for _, bits in cell["curve"][-1:])
        axes.set(title=size, xlabel="million tokens", ylim=(0.97 * low, 1.35 * low))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out bits per byte")
    panels[0].legend(fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def picture_of_free(cells: dict[str, Any], file: Path) -> None:
    """What dropping inputs without training costs in perplexity, with and without LaRoSA, a panel per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = [("units of 4, WINA", "LaRoSA, units of 4, WINA"), ("WINA", "LaRoSA")]
    kinds += [("budget + WINA", "LaRoSA, budget + WINA")]
    for axes, (name, title) in zip(
        panels, (("tinystories", "tinystories-656K"), ("reference", "bundled model")), strict=True
    ):
        dense = cells[f"{name}/dense"]["perplexity"]
        for color, pair in enumerate(kinds):
            for method, style in zip(pair, ("--", "-"), strict=True):
                found = [(s, cells.get(f"{name}/{method}/{s}")) for s in SHARES]
                rows = [(s, cell["perplexity"] / dense - 1) for s, cell in found if cell is not None]
                look = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "color": f"C{color}"}
                label = "LaRoSA, Top-K" if method == "LaRoSA" else method
                axes.plot([100 * s for s, _ in rows], [100 * y for _, y in rows], style, label=label, **look)
        axes.set(title=title, xlabel="% of inputs dropped", yscale="log")
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylabel("perplexity above the dense model's, %")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(file, dpi=130)


def select() -> None:
    """Prints milliseconds, the best of five."""
    import torch

    from tulle import _native
    from tulle.core.masks import largest
    from tulle.core.topk import keep_largest

    print(f"{torch.get_num_threads()} threads; milliseconds for 8192 tokens")
    for channels in (256, 768, 2048, 5632):
        scores = torch.randn(8192, channels).abs()
        keep = round(0.3 * channels)
        weight = torch.randn(256, channels)
        ways = {
            "keep_largest": lambda s=scores, k=keep: keep_largest(s, k),
            "kthvalue and ties": lambda s=scores, k=keep: largest(s, k),
            "torch.topk": lambda s=scores, k=keep: s.topk(k, sorted=False),
            "product with 256 rows": lambda s=scores, w=weight: s @ w.T,
        }
        times = {}
        one = torch.randn(channels).numpy()
        # The engine's, one token at a time; what it is given is as new each time.
        ways["engine"] = lambda x=one, k=keep: [_native.top_k(x.copy(), k) for _ in range(8192)]
        for name, way in ways.items():
            taken = []
            for _ in range(5):
                begun = time.perf_counter()
                way()
                taken.append(time.perf_counter() - begun)
            times[name] = 1000 * min(taken)
        print(f"{keep} of {channels}: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["free", "scratch", "law", "continue", "gradients", "context", "picture", "select"]
    )
    parser.add_argument("--data", type=Path, help="with models/tinystories-656K and text/tinystories_10k.txt")
    parser.add_argument("--models", nargs="*", default=["tinystories", "reference"])
    parser.add_argument("--methods", nargs="*", help="of free, scratch or continue; without: all")
    parser.add_argument("--sizes", nargs="*", default=LAW_SIZES, choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each training run")
    parser.add_argument("--rate", type=float, help="learning rate of scratch, for cells of their own")
    parser.add_argument("--seed", type=int, default=0, help="of scratch; others than 0 have cells of their own")
    parser.add_argument("--work", type=Path, default=Path("build/q_sparse"), help="folder of the training runs")
    parser.add_argument("--source", type=Path, help="JSON of scratch, of whose runs context is asked")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    known = {
        "free": free_recipes(0.5),
        "scratch": [*SCRATCH_METHODS, *ROTATED],
        "continue": continued_recipes() | untrained_recipes(),
    }
    if given.methods and not set(given.methods) <= set(known.get(given.what, {})):
        parser.error(f"expected methods of {given.what}: {'; '.join(known.get(given.what, {'none': []}))}")
    if given.what == "free":
        free(given.data, given.models, given.methods, given.out or RESULTS / "activation_sparsity.json")
        return
    if given.what == "picture":
        cells = json.loads((RESULTS / "q_sparse.json").read_text())["cells"]
        folder = given.out or RESULTS.parents[1] / "docs/pictures"
        picture(cells, folder / "q-sparse-curves.png")
        picture_of_free(json.loads((RESULTS / "activation_sparsity.json").read_text())["cells"], folder / "larosa.png")
        return
    if given.what == "select":
        select()
        return
    from tulle import machine

    import_methods()
    out = given.out or RESULTS / "q_sparse.json"
    trainer = Trainer(Cells(out, machine=machine.describe()), given.work)
    if given.what == "scratch":
        scratch(trainer, given.sizes, given.methods, given.tokens, given.rate, given.seed)
    elif given.what == "gradients":
        gradients(trainer, given.out or RESULTS / "q_sparse_gradients.json")
    elif given.what == "context":
        context(trainer, given.source or RESULTS / "q_sparse_5m.json", given.out or RESULTS / "q_sparse_context.json")
    elif given.what == "law":
        law(trainer, given.sizes, given.tokens, out.with_name(out.stem + "_runs.json"))
    else:
        continued(trainer, given.tokens, given.methods)


if __name__ == "__main__":
    main()
