"""Sparse training side by side, on a model of 0.57 M parameters: bits per byte and recovery.

    python benchmarks/train_sparse.py --data DIR [--groups pretrain narrow …] [--seeds 0 …]

DIR holds gen/gsm8k_{train,test}.jsonl (the narrow task: word problems of one format) and
text/{wiki.valid.raw,wiki.test.raw,calibration-wiki.txt,calibration-technical.txt} (the broad one: encyclopaedia and
documentation). Pretraining text is Python source of this machine, as for the reference model.

- ``pretrain``: a dense model goes on for 2 chunks of tokens; beside it 50 % by SparseGPT with masks held, then 70 %;
  one-shot pruning of each dense model, with no training; gradual magnitude as the baseline.
- ``narrow``, ``broad``: fine-tuning in four ways at 70 % and 50 %, with and without SquareHead: 1 dense fine-tune, then
  prune; 2 prune while fine-tuning; 3 fine-tune the one-shot pruned model; 4 fine-tune the sparse-pretrained one.
- ``2:4``: from scratch: STE, SR-STE, S-STE, STEP beside dense training and magnitude one-shot.
- ``top_kast``: (80 %, 50 %) and (90 %, 80 %) beside masks that stand still.
- ``road``: the 70 % model of the narrow task quantised (W8A8, W4) and packed.

Every run is a cell: finished ones are kept, an unfinished one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, compressed, import_methods  # noqa: E402

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
VOCABULARY = 1024
PYTHON = ("stdlib", "numpy", "networkx", "pydantic", "rich", "click", "jinja2", "pytest")
TOKENS = {"base": 2_000_000, "chunk": 1_000_000, "task": 500_000}
TRAINING = {
    "context": 256, "batch": 8, "optimizer": "adamw", "precision": "fp32", "compile": False, "evaluate_windows": 64,
    "evaluate_every": 50, "checkpoint_every": 50, "weight_decay": 0.1,
}  # fmt: skip
SCRATCH = {"learning_rate": 4e-3, "schedule": "wsd", "warmup_steps": 50, "decay_fraction": 0.3}
ON = {"learning_rate": 1.5e-3, "schedule": "linear"}
TUNE = {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 20, "weight_decay": 0.0}
HELD: dict[str, Any] = {"held_masks": {}}
GROUPS = ("pretrain", "narrow", "broad", "2:4", "top_kast", "road")


def pruning(share: float | str, method: str = "sparsegpt") -> dict[str, Any]:
    """A compression recipe of one pruning step; ``share`` may be a pattern."""
    step = {"pattern": share} if isinstance(share, str) else {"sparsity": share}
    return {"steps": [{method: step}], "calibration": {"samples": 64, "length": 256}}


class Bench:
    """Runs cells; a cell's model lies in ``work/KEY`` and other cells start from there."""

    def __init__(self, cells: Cells, work: Path, data: Path, seed: int, rate: float | None):
        self.cells, self.work, self.seed, self.rate = cells, work, seed, rate
        self.texts = gen, text = data / "gen", data / "text"
        problem = "Question: {question}\nAnswer: {answer}"
        self.tasks: dict[str, dict[str, Any]] = {
            "narrow": {
                "sources": [{"path": str(gen / "gsm8k_train.jsonl"), "template": problem}],
                "held_out": [{"path": str(gen / "gsm8k_test.jsonl"), "template": problem, "documents": 400}],
            },
            "broad": {
                "sources": [
                    {"path": str(text / name)}
                    for name in ("wiki.valid.raw", "calibration-wiki.txt", "calibration-technical.txt")
                ],
                "held_out": [{"path": str(text / "wiki.test.raw"), "separator": " \n = ", "documents": 200}],
            },
        }

    def name(self, key: str) -> str:
        return f"{self.seed}/{key}" if self.rate is None else f"{self.seed}/rate {self.rate}/{key}"

    def folder(self, key: str) -> Path:
        return self.work / self.name(key).replace("/", "__").replace(":", "of").replace(" ", "_")

    def run(self, key: str, content: dict[str, Any]) -> dict[str, Any]:
        """The cell of a recipe."""
        found: dict[str, Any] = self.cells.make(self.name(key), lambda: self._train(key, content))
        print(f"{self.name(key)}: {found['held_out_bits_per_byte']:.4f} bits per byte, sparsity "
              f"{found['sparsity']:.2f}, {found['seconds']:.0f} s", flush=True)  # fmt: skip
        return found

    def _train(self, key: str, content: dict[str, Any]) -> dict[str, Any]:
        from tulle.training.curve import read_metrics
        from tulle.training.launch import train

        begun, out = time.perf_counter(), self.folder(key)
        # Tokens are the same for many cells: one cache for all.
        (self.work / "data").mkdir(parents=True, exist_ok=True)
        out.mkdir(exist_ok=True)
        if not (out / "data").exists():
            (out / "data").symlink_to((self.work / "data").resolve())
        # A kill may have come before the first checkpoint: --resume starts such a run anew.
        train(content, out, resume=True, log=lambda line: None)
        record = json.loads((out / "run.json").read_text())
        rows = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
        kept = {k: record[k] for k in ("held_out_bits_per_byte", "sparsity", "tokens_seen")}
        return kept | {"seconds": time.perf_counter() - begun, "recipe": self._named(content), "rows": rows}

    def _named(self, content: dict[str, Any]) -> Any:
        """The recipe with models and texts by name, wherever this machine keeps them."""
        text = json.dumps(content)
        for folder in (self.work, *self.texts):
            text = text.replace(json.dumps(f"{folder}/")[1:-1], "")
        return json.loads(text)

    def scratch(self, methods: list[dict[str, Any]], prune: Any = None, **training: Any) -> dict[str, Any]:
        """A recipe from nothing on Python source."""
        tokens = {"tokens": TOKENS["base"]} | training
        content = {
            "seed": self.seed,
            "model": SHAPE,
            "data": {"sources": [{"name": n} for n in PYTHON], "vocab_size": VOCABULARY},
            "training": TRAINING | SCRATCH | ({"learning_rate": self.rate} if self.rate else {}) | tokens,
        }
        if prune is None:
            return content | {"methods": methods}
        return content | {"stages": [{"name": "train", "prune": prune, "methods": methods}]}

    def on(
        self, start: str, stages: list[dict[str, Any]], task: str | None = None, tokens: int | None = None
    ) -> dict[str, Any]:
        """A recipe that goes on from another cell's model, on Python source or on a task."""
        default = TOKENS["chunk"] if task is None else TOKENS["task"]
        return {
            "seed": self.seed,
            "start": str(self.folder(start)),
            "data": {"sources": [{"name": n} for n in PYTHON]} if task is None else self.tasks[task],
            "training": TRAINING | (ON if task is None else TUNE) | {"tokens": default if tokens is None else tokens},
            "stages": stages,
        }

    def base(self) -> None:
        self.run("dense", self.scratch([]))

    def pretrain(self) -> None:
        self.base()
        train, once = {"name": "train", "methods": [HELD]}, {"tokens": 0}
        self.run("one-shot 50", self.on("dense", [{"name": "p", "prune": pruning(0.5), "training": once}]))
        self.run("one-shot 70", self.on("dense", [{"name": "p", "prune": pruning(0.7), "training": once}]))
        self.run("sparse 50, 1", self.on("dense", [train | {"prune": pruning(0.5)}]))
        self.run("dense, 1", self.on("dense", [{"name": "train"}]))
        self.run("sparse 70, 2", self.on("sparse 50, 1", [train | {"prune": pruning(0.7)}]))
        self.run("dense, 2", self.on("dense, 1", [{"name": "train"}]))
        for share in (50, 70):
            stage = {"name": "p", "prune": pruning(share / 100), "training": once}
            self.run(f"dense, 2, one-shot {share}", self.on("dense, 2", [stage]))

    def baselines(self) -> None:
        """More of pretraining: 50 % for as long, 70 % at once, and gradual magnitude over as many tokens."""
        train = {"name": "train", "methods": [HELD]}
        self.run("sparse 50, 2", self.on("sparse 50, 1", [train]))
        twice = [train | {"prune": pruning(0.7)}, {"name": "more", "methods": [HELD]}]
        self.run("sparse 70 at once, 2", self.on("dense", twice))
        for share in (0.5, 0.7):
            gradual = {"name": "train", "methods": [{"gradual_magnitude": {"sparsity": share, "every": 20}}]}
            more = {"name": "more", "methods": [HELD]}
            self.run(f"gradual {round(100 * share)}, 2", self.on("dense", [gradual, more]))

    def tune(self, task: str, share: int) -> None:
        """The four ways on a task, to one sparsity."""
        s, tokens = share / 100, TOKENS["task"]
        self.run(f"{task}/dense", self.on("dense, 2", [{"name": "train"}], task))
        last = {"name": "p", "prune": pruning(s), "training": {"tokens": 0}}
        self.run(f"{task}/{share}/1", self.on(f"{task}/dense", [last], task))
        for head in (False, True):
            teacher = [{"squarehead": {"teacher": str(self.folder(f"{task}/dense"))}}] if head else []
            mark = "+SquareHead" if head else ""
            stage = {"name": "train", "methods": [HELD, *teacher]}
            self.run(f"{task}/{share}/4{mark}", self.on(f"sparse {share}, 2", [stage], task))
            self.run(f"{task}/{share}/3{mark}", self.on(f"dense, 2, one-shot {share}", [stage], task))
            marks = [0.5, 0.7] if share == 70 else [0.5]
            part = tokens // (len(marks) + 1)
            stages: list[dict[str, Any]] = [{"name": "dense", "methods": teacher, "training": {"tokens": part}}]
            for mark_share in marks:
                methods = [HELD, *teacher]
                stages.append({
                    "name": f"to{round(100 * mark_share)}", "prune": pruning(mark_share), "methods": methods,
                    "training": {"tokens": part},
                })  # fmt: skip
            self.run(f"{task}/{share}/2{mark}", self.on("dense, 2", stages, task))

    def patterns(self, names: tuple[str, ...]) -> None:
        self.base()
        stage = {"name": "p", "prune": pruning("2:4", "magnitude"), "training": {"tokens": 0}}
        self.run("2:4/magnitude one-shot", self.on("dense", [stage]))
        for name in names:
            self.run(f"2:4/{name}", self.scratch([{name: {"pattern": "2:4"}}]))

    def top_kast(self, forward: int, backward: int, explore: float | None = None) -> None:
        self.base()
        settings = {"forward_sparsity": forward / 100, "backward_sparsity": backward / 100, "refresh": 20}
        name = f"top_kast/{forward}, {backward}"
        if explore is not None:
            name, settings = f"{name}, refresh 20, explore {explore}", settings | {"explore": explore}
        self.run(name, self.scratch([{"top_kast": settings}]))
        static = pruning(forward / 100, "magnitude")
        self.run(f"top_kast/static {forward}", self.scratch([HELD], prune=static))

    def road(self) -> None:
        """The narrow 70 % model with SquareHead, trained twice as long at a higher rate as the paper does at 70 %,
        quantised and packed; figures of the packed model. Beside it a dense model trained as long.
        """
        longer = {"tokens": 2 * TOKENS["task"], "learning_rate": 2.5 * TUNE["learning_rate"]}
        head = {"squarehead": {"teacher": str(self.folder("narrow/dense"))}}
        start = self.folder("narrow/70/4+SquareHead, longer")
        stage = {"name": "train", "methods": [HELD, head], "training": longer}
        self.run("narrow/70/4+SquareHead, longer", self.on("sparse 70, 2", [stage], "narrow"))
        dense = {"name": "train", "training": longer | {"learning_rate": TUNE["learning_rate"]}}
        self.run("narrow/dense, longer", self.on("dense, 2", [dense], "narrow"))
        recipes: dict[str, list[dict[str, Any]]] = {
            "W8A8": [
                {"smoothquant": {"alpha": 0.5}}, {"activations": {"bits": 8}}, {"gptq": {"bits": 8}},
            ],
            "W4": [{"gptq": {"bits": 4, "group_size": 64}}],
        }  # fmt: skip
        for name, steps in recipes.items():
            self.cells.make(self.name(f"road/{name}"), lambda name=name, steps=steps: self._packed(start, name, steps))
            print(f"{self.name(f'road/{name}')}: {self.cells.all[self.name(f'road/{name}')]}", flush=True)
        self.cells.make(self.name("road/speed"), self._speed)
        print(f"{self.name('road/speed')}: {self.cells.all[self.name('road/speed')]}", flush=True)

    def _speed(self) -> dict[str, Any]:
        """Decoding on one thread, tokens/s: medians of interleaved rounds of 64 tokens after 64."""
        import statistics

        import torch
        from transformers import AutoModelForCausalLM

        from tulle.engine import Engine

        dense = self.folder("narrow/dense, longer")
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        prompt, count = list(range(64)), 64

        def in_torch() -> None:
            with torch.inference_mode():
                found = model(torch.tensor([prompt]), use_cache=True)
                for _ in range(count):
                    token = found.logits[:, -1:].argmax(-1)
                    found = model(token, past_key_values=found.past_key_values, use_cache=True)

        def in_engine(engine: Engine) -> None:
            logits = engine.forward(prompt, 0, 0, [len(prompt) - 1])
            for i in range(count):
                logits = engine.forward([int(logits[-1].argmax())], 0, len(prompt) + i, [0])

        ways: dict[str, Callable[[], None]] = {"torch float32, dense": in_torch}
        folders = {"dense bf16": dense} | {name: self.folder(f"road/{name}") for name in ("W8A8", "W4")}
        for name, folder in folders.items():
            ways[f"engine, {name}"] = partial(in_engine, Engine(folder, 1, 256))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(8):  # the first one warms up
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                if number:
                    seconds[name].append(time.perf_counter() - begun)
        return {name: count / statistics.median(taken) for name, taken in seconds.items()}

    def _packed(self, start: Path, name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
        recipe = {"steps": steps, "calibration": {"samples": 64, "length": 256}}
        out = self.folder(f"road/{name}")
        bits, report = compressed(start, recipe, out, self.tasks["narrow"], self.seed, 1024, 256, self.work)
        totals = report["totals"]
        kept = ("linear_dense_bytes", "linear_packed_bytes", "bits_per_weight", "sparsity")
        return {"held_out_bits_per_byte": bits, "seconds": report["seconds"]["total"]} | {k: totals[k] for k in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--rate", type=float, help="learning rate from scratch, for cells of their own [4e-3]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/train_sparse"), help="models of finished cells")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/train_sparse.json")
    parser.add_argument("--pictures", type=Path, help="only draw what the JSON holds into this folder")
    arguments = parser.parse_args()
    if arguments.pictures is not None:
        from train_sparse_pictures import draw

        draw(json.loads(arguments.out.read_text())["cells"], arguments.pictures)
        return

    import torch

    from tulle import machine

    torch.set_num_threads(arguments.threads)
    import_methods()
    facts = {"shape": SHAPE, "vocabulary": VOCABULARY, "tokens": TOKENS, "training": TRAINING}
    cells = Cells(arguments.out, machine=machine.describe() | {"threads": arguments.threads}, **facts)
    for seed in arguments.seeds:
        bench = Bench(cells, arguments.work, arguments.data, seed, arguments.rate)
        # The most telling first.
        work: list[tuple[str, Callable[[], None]]] = [
            ("pretrain", bench.pretrain),
            ("narrow", lambda b=bench: b.tune("narrow", 70)),
            ("road", bench.road),
            ("2:4", lambda b=bench: b.patterns(("sr_ste", "ste"))),
            ("broad", lambda b=bench: b.tune("broad", 70)),
            ("top_kast", lambda b=bench: b.top_kast(80, 50)),
            ("top_kast", lambda b=bench: b.top_kast(90, 80)),
            ("top_kast", lambda b=bench: b.top_kast(80, 50, explore=0.1)),
            ("pretrain", bench.baselines),
            ("narrow", lambda b=bench: b.tune("narrow", 50)),
            ("broad", lambda b=bench: b.tune("broad", 50)),
            ("2:4", lambda b=bench: b.patterns(("s_ste", "step"))),
        ]
        for group, make in work:
            if group in arguments.groups:
                make()


if __name__ == "__main__":
    main()
