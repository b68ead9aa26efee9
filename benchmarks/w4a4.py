"""Every method of weight-and-activation quantisation on one footing: perplexity and mean layer error.

    python benchmarks/w4a4.py --data DIR [--models …] [--variants …] [--bits 4 6] [--methods …]

Models: tinystories-656K (protocol of peer_tinystories.py) and the bundled reference model (calibration on modules of
the standard library's training side, evaluation on the beginnings of its held-out modules). Variants: raw, and the same
function with outliers (tulle.models.outliers): normal (norm gains, v/o, RoPE pairs), massive (a few tokens at down's
input, four channels of every block, a thousand times the median) and rotated (both, in a rotated residual stream).

One footing: activations per token, asymmetric; weights per output channel, asymmetric; keys, values, embeddings and
head as they are; the same calibration tokens, the same passes over them for everything learned. Every linear is fitted
to its own dense output (target: layer). Finished cells of the JSON are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells, import_methods  # noqa: E402

VARIANTS = ("raw", "normal", "massive", "rotated")
MODELS = ("tinystories", "reference")
CLIP = 0.9
"""Activation clip of the rotation methods, as QuaRot and DuQuant have it."""
SETTINGS = {"tinystories": {"samples": 64, "epochs": 10}, "reference": {"samples": 16, "epochs": 5}}


def recipes(bits: int, epochs: int) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Method → (steps, calibration target)."""
    grid = {"bits": bits, "symmetric": False}
    rtn, learned = {"round_to_nearest": grid}, grid | {"epochs": epochs}
    plain, clipped = {"activations": grid}, {"activations": grid | {"clip": CLIP if bits < 6 else 1.0}}
    clipped_rtn = {"round_to_nearest": grid | {"clip": 0.8 if bits < 6 else 1.0}}
    gptq = {"gptq": grid | {"descent": 0}}
    lwc = {"learned_clipping": learned | {"rate": 1e-2}}
    smooth = {"smoothquant": {"alpha": 0.6}}
    spin = {"bits": bits, "symmetric": False, "input_bits": bits}
    return {
        "RTN": ([plain, rtn], "layer"),
        "SmoothQuant": ([{"smoothquant": {"alpha": 0.5}}, plain, rtn], "layer"),
        "OmniQuant-LWC": ([plain, lwc, rtn], "layer"),
        "QuaRot-RTN": ([{"quarot": {}}, clipped, rtn], "layer"),
        "QuaRot-GPTQ": ([{"quarot": {}}, clipped, gptq], "layer"),
        "SpinQuant": ([{"spinquant": spin}, {"quarot": {"residual": False}}, clipped, gptq], "layer"),
        "AffineQuant": (
            [
                {"smoothquant": {"alpha": 0.5}},
                plain,
                {"affinequant": learned | {"targets": ["qkv", "o", "gate_up"], "alpha": 0.1, "inputs": False}},
                rtn,
            ],
            "layer",
        ),
        "FlatQuant": ([plain, {"flatquant": learned}, rtn], "layer"),
        "DuQuant": ([smooth, {"duquant": {}}, clipped, clipped_rtn], "layer"),
        "DuQuant+LWC": ([smooth, {"duquant": {}}, clipped, lwc, rtn], "layer"),
        "ours": (
            [
                {"smoothquant": {"alpha": 0.5, "size": "rms"}},
                {"perq": {}},
                clipped,
                {"affinequant": learned | {"alpha": 1.0}},
                {"gptq": grid | {"clip_search": 0}},
            ],
            "layer",
        ),
    }


class Bench:
    """A model's variants, its texts and its protocol."""

    def __init__(self, name: str, data: Path | None, folder: Path, samples: int) -> None:
        from tulle.compression.demo import calibration_modules, evaluation_text
        from tulle.evaluate.text import Protocol
        from tulle.models.hub import local_folder
        from tulle.text.reading import read_text

        self.name, self.folder, self.samples = name, folder, samples
        if name == "reference":
            self.model, self.calibration = local_folder("reference"), calibration_modules()
            self.evaluation, self.protocol = evaluation_text(2000)
            return
        assert data is not None
        text = [data / "text/tinystories_10k.txt"]
        self.model = data / "models/tinystories-656K"
        self.calibration = read_text(text, "<|endoftext|>", (200, 456), 101)
        self.evaluation = read_text(text, "<|endoftext|>", (0, 100), 101)
        self.protocol = Protocol(length=512)

    def variant(self, kind: str) -> Path:
        """The folder of the model with outliers of a kind; the same function."""
        import outliers

        if kind == "raw":
            return self.model
        folder = self.folder / f"{self.name}-{kind}"
        if not folder.exists():
            kinds = {"normal": outliers.NORMAL, "massive": outliers.MASSIVE, "rotated": outliers.ROTATED}[kind]
            layers = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
            settings: dict[str, Any] = {"massive_channels": 4, "massive_blocks": range(layers)}
            outliers.inject_outliers(self.model, folder, kinds, tokens=self._tokens(), **settings)
        return folder

    def _tokens(self) -> Any:
        import torch
        from transformers import AutoTokenizer

        from tulle.text.reading import sequences

        found = sequences(self.calibration, AutoTokenizer.from_pretrained(self.model), 128, 8)
        return torch.stack([t for t in found if len(t) == 128])

    def perplexity(self, folder: Path) -> float:
        from tulle.evaluate.loading import load_model
        from tulle.evaluate.perplexity import evaluate_text

        model, tokenizer = load_model(folder)
        return evaluate_text(model, tokenizer, self.evaluation, self.protocol)["perplexity"]

    def run(self, model: Path, steps: list[dict[str, Any]], target: str, seed: int = 0) -> dict[str, Any]:
        """Perplexity, mean layer error and seconds of a recipe."""
        from tulle.compression.job import compress

        calibration = {"samples": self.samples, "length": 512, "target": target}
        with tempfile.TemporaryDirectory(dir=self.folder) as parent:
            recipe = {"name": "bench", "calibration": calibration, "steps": steps}
            begun = time.perf_counter()
            report = compress(model, recipe, Path(parent) / "m", calibration=self.calibration, seed=seed)
            seconds = time.perf_counter() - begun
            errors = [linear["output_error"] for linear in report["linears"]]
            return {
                "perplexity": self.perplexity(Path(parent) / "m"),
                "layer_error": sum(errors) / len(errors),
                "seconds": seconds,
            }


def _dense(bench: Bench, model: Path) -> dict[str, Any]:
    return {"perplexity": bench.perplexity(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/tinystories-656K and text/tinystories_10k.txt")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 6])
    parser.add_argument("--methods", nargs="*", choices=list(recipes(4, 1)), default=list(recipes(4, 1)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/w4a4.json")
    arguments = parser.parse_args()
    if "tinystories" in arguments.models and not arguments.data:
        parser.error("--data is required for tinystories")

    import torch
    from rich.console import Console

    from tulle import machine

    torch.set_num_threads(arguments.threads)
    import_methods()
    cells = Cells(
        arguments.out,
        protocol=" ".join(str(__doc__).split("Models: ")[1].split()),
        machine=machine.describe() | {"threads": arguments.threads},
        settings=SETTINGS,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            settings = SETTINGS[name]
            bench = Bench(name, arguments.data, Path(folder), settings["samples"])
            # All variants of a method before the next one: a run that is cut short is still a table.
            for bits in arguments.bits:
                for method in ["FP", *arguments.methods]:
                    for variant in arguments.variants:
                        model = bench.variant(variant)
                        if method == "FP":
                            cells.make(f"{name}/{variant}/FP", partial(_dense, bench, model))
                            continue
                        steps, target = recipes(bits, settings["epochs"])[method]
                        key = f"{name}/{variant}/W{bits}A{bits}/{method}"
                        found = cells.make(key, partial(bench.run, model, steps, target))
                        Console().print(
                            f"{key}: {found['perplexity']:.2f}, layer error {found['layer_error']:.4f}, "
                            f"{found['seconds']:.0f} s"
                        )
    print_tables(cells.all)


def print_tables(cells: dict[str, Any]) -> None:
    """A table per model and bits: perplexity (mean layer error)."""
    from rich.console import Console
    from rich.table import Table

    for name in MODELS:
        for scheme in sorted({key.split("/")[2] for key in cells if key.startswith(name)} - {"FP"}):
            table = Table("method", *VARIANTS, title=f"{name}, {scheme}: perplexity (mean layer error)")
            dense = [cells.get(f"{name}/{v}/FP", {}).get("perplexity") for v in VARIANTS]
            table.add_row("FP", *("–" if p is None else f"{p:.2f}" for p in dense))
            for method in recipes(4, 1):
                found = [cells.get(f"{name}/{v}/{scheme}/{method}") for v in VARIANTS]
                table.add_row(
                    method, *("–" if c is None else f"{c['perplexity']:.2f} ({c['layer_error']:.3f})" for c in found)
                )
            Console().print(table)


if __name__ == "__main__":
    main()
