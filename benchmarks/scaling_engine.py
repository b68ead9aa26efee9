"""Scaling Transformers in the native engine: seconds per token, dense against +FFN, +QKV and both.

    python benchmarks/scaling_engine.py decode [--shapes 800m wide] [--peer-python PY] [--threads 2]
    python benchmarks/scaling_engine.py widths [--widths 512 …] [--threads 2]
    python benchmarks/scaling_engine.py draw --pictures DIR

Random weights at real size, made in memory; batch 1, a prompt of 32 tokens, then random tokens. Every case lives in one
process, a round decodes some tokens with each in turn; medians, of ratios those of the rounds' ratios, since the memory
of a shared machine is faster in one minute than in the next. Bytes are what a token reads: weights, less the rows of
w2 that are not read since relu gave zero, and keys and values in float32; beside them what as many threads reach that
only read, in the same rounds.

800m: the paper's, 24 layers of d 1024, vocabulary 32000, d_ff 4096 (dense) and 6144 (both); d_ff of the others matched
in parameters. wide: 2 layers of d 9216, d_ff 40960 and 65536, N 256, S 64, a vocabulary that costs nothing. There the
large matrices of the layers share memory, which holds one layer and is far larger than any cache; small ones do not.
widths: N 64, S 16, float32, d_ff 4·d, as many layers as make a gigabyte of dense ones, no head.

``--peer-python``: a Python with llama-cpp-python (built from source for this machine) and gguf: llama.cpp in F32 on a
Llama shape of as many bytes as the dense 800m, in a process of its own, in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells  # noqa: E402
from speed import Worker  # noqa: E402
from tulle import _native  # noqa: E402
from tulle.engine.files import huge  # noqa: E402
from tulle.engine.native_model import (  # noqa: E402
    Convolution,
    Matrix,
    Multiplicative,
    Panels,
    Projection,
    ScalingLayer,
    ScalingModel,
    WeightKind,
    consecutive_pages,
)
from tulle.format.pack import f32_to_bf16  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scaling_engine.json"
SHAPES: dict[str, dict[str, Any]] = {
    "800m": {"hidden": 1024, "heads": 16, "layers": 24, "vocabulary": 32000, "S": 16, "N": 64,
             "d_ff": {"dense": 4096, "both": 6144}, "tokens": 8},
    "wide": {"hidden": 9216, "heads": 64, "layers": 2, "vocabulary": 8, "S": 64, "N": 256,
             "d_ff": {"dense": 40960, "both": 65536}, "tokens": 4},
}  # fmt: skip
CASES = {"dense": (False, False), "+FFN": (True, False), "+QKV": (False, True), "both": (True, True)}
"""Whether feed-forward and attention are sparse."""
KINDS = ("f32", "bf16", "int8")
TYPES = {"f32": np.float32, "bf16": np.uint16, "codes8": np.uint8}
WIDTHS = (512, 1024, 2048, 4096, 8192)
PROMPT, ROUNDS = 32, 7
LARGE = 1 << 22
"""Numbers of a matrix from which on layers may share it."""
NOISE = 0.02


class Pool:
    """Random numbers of one kind in huge pages. What is small is never given twice; what is large may be, from the
    start again where the end is reached."""

    def __init__(self, kind: str, small: int, large: int):
        self._dtype = np.dtype(TYPES[kind])
        self._numbers = huge((small + large) * self._dtype.itemsize).view(self._dtype)
        generator = np.random.default_rng(0)
        # Drawn once: a billion draws would take longer than the measurement.
        block: Any = NOISE * generator.standard_normal((1 << 20) + 7, np.float32)
        if kind == "bf16":
            block = f32_to_bf16(block)
        if kind == "codes8":
            block = generator.integers(1, 256, len(block), np.uint8)
        for start in range(0, len(self._numbers), len(block)):
            part = self._numbers[start : start + len(block)]
            part[:] = block[: len(part)]
        self._small, self._large, self._begin = 0, small, small

    def take(self, count: int) -> Any:
        padded = count + -count % 64
        if count < LARGE:
            self._small += padded
            assert self._small <= self._begin
            return self._numbers[self._small - padded : self._small - padded + count]
        if self._large + padded > len(self._numbers):
            self._large = self._begin
        self._large += padded
        return self._numbers[self._large - padded : self._large - padded + count]

    def restart(self) -> None:
        """For another model."""
        self._small, self._large = 0, self._begin


@functools.cache
def embedding_of(vocabulary: int, d: int) -> Any:
    """In float32: a token reads one row."""
    return NOISE * np.random.default_rng(1).standard_normal((vocabulary, d), np.float32)


class Builder:
    """Settings of ``_native.ScalingEngine``, filled from pools. With ``pools`` None it only counts numbers."""

    def __init__(self, kind: str, pools: dict[str, Pool] | None):
        self.wide, self.narrow = ("codes8", "bf16") if kind == "int8" else (kind, kind)
        self.pools, self.count = pools, {kind: [0, 0] for kind in TYPES}
        self.parameters = 0

    def _take(self, kind: str, count: int) -> Any:
        self.count[kind][count >= LARGE] += count + 64
        return None if self.pools is None else self.pools[kind].take(count)

    def matrix(self, rows: int, columns: int, wide: bool = True) -> Matrix:
        kind = self.wide if wide else self.narrow
        self.parameters += rows * columns
        scales = np.full(rows, NOISE / 64, np.float32) if kind == "codes8" and self.pools else None
        values = self._take(kind, rows * columns)
        return Matrix(WeightKind(kind), rows, columns, values, scales)

    def panels(self, inputs: int, outputs: int) -> Panels:
        self.parameters += inputs * outputs
        values = self._take(self.narrow, -(-outputs // 16) * 16 * inputs)
        return Panels(WeightKind(self.narrow), inputs, outputs, values)

    def projection(self, rows: int, columns: int) -> Projection:
        return Projection(self.matrix(rows, columns))

    def multiplicative(self, inputs: int, outputs: int, modules: int) -> Multiplicative:
        e = self.panels(inputs, outputs // modules)
        return Multiplicative(self.matrix(modules, inputs, False), e)

    def layer(self, d: int, d_ff: int, block: int, modules: int) -> ScalingLayer:
        ones = np.ones(d, np.float32)
        attention: dict[str, Any] = {}
        if modules:
            size = d // modules
            attention["multiplicative"] = self.multiplicative(d, d, modules)
            for part, width in (("q", 3), ("k", 3), ("v", 1)):
                attention[f"{part}_conv"] = Convolution(self.panels(3 * width * size, size))
        else:
            attention = {part: self.projection(d, d) for part in "qkvo"}
        w1 = self.projection(d_ff, d)
        if not block:
            return ScalingLayer(ones, ones, w1, self.projection(d, d_ff), **attention)
        rank = d // block
        bias = np.zeros(d_ff, np.float32)
        w2, c1, c2 = self.projection(d_ff, d), self.matrix(rank, d, False), self.panels(rank, d_ff)
        return ScalingLayer(ones, ones, w1, w2, c1=c1, c2=c2, c2_bias=bias, **attention)

    def model(self, shape: dict[str, Any], d_ff: int, block: int, modules: int, loss: int = 0) -> ScalingModel:
        d, vocabulary = shape["hidden"], shape["vocabulary"]
        inverse = 1.0 / 10000.0 ** (np.arange(0, d // shape["heads"], 2) / (d // shape["heads"]))
        head: Matrix | Multiplicative = self.matrix(vocabulary, d)
        if loss:
            head = self.multiplicative(d, vocabulary, loss)
        embedding = embedding_of(vocabulary, d).reshape(-1)
        return ScalingModel(
            hidden=d, intermediate=d_ff, heads=shape["heads"], vocabulary=vocabulary, modules=modules, block=block,
            loss_modules=loss, eps=1e-6, inverse_frequencies=inverse.tolist(),
            embedding=Matrix(WeightKind.F32, vocabulary, d, embedding, None), norm=np.ones(d, np.float32), head=head,
            exact_head=None, layers=[self.layer(d, d_ff, block, modules) for _ in range(shape["layers"])],
        )  # fmt: skip


def matched(shape: dict[str, Any], block: int, modules: int) -> int:
    """d_ff, a multiple of the block, with which a layer has the parameters of a dense one."""

    def count(d_ff: int, block: int, modules: int) -> int:
        builder = Builder("f32", None)
        builder.layer(shape["hidden"], d_ff, block, modules)
        return builder.parameters

    step = block or 64
    one = count(step, block, modules)
    per_step = count(2 * step, block, modules) - one
    return (1 + round((count(shape["d_ff"]["dense"], 0, 0) - one) / per_step)) * step


def plans(shape: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, tuple[str, dict[str, int]]]:
    """Case and kind → the arguments of :meth:`Builder.model`."""
    found = {}
    for kind in kinds:
        for case, (feed_forward, attention) in CASES.items():
            block, modules = shape["N"] * feed_forward, shape["S"] * attention
            d_ff = shape["d_ff"].get(case) or matched(shape, block, modules)
            found[f"{case} {kind}"] = (kind, {"d_ff": d_ff, "block": block, "modules": modules})
        if shape["vocabulary"] > 1000:
            found[f"both, loss layer {kind}"] = (kind, found[f"both {kind}"][1] | {"loss": 8})
    return found


class Case:
    """One engine."""

    def __init__(self, settings: ScalingModel, rounds: int, tokens: int, threads: int):
        context = PROMPT + (rounds + 1) * tokens
        self.tables = consecutive_pages(1, context)
        self.engine = _native.ScalingEngine(settings, self.tables.size, 1, context, PROMPT, "f32", threads)
        self.vocabulary, self.position = settings.vocabulary, 0
        self.logits = np.empty((1, self.vocabulary), np.float32)
        self.generator = np.random.default_rng(2)
        self.step(PROMPT)

    def step(self, count: int = 1) -> None:
        tokens = self.generator.integers(0, self.vocabulary, count).astype(np.int32)
        positions = np.arange(self.position, self.position + count, dtype=np.int32)
        slots, rows = np.zeros(count, np.int32), np.full(1, count - 1, np.int32)
        self.engine.forward(tokens, slots, positions, self.tables, rows, self.logits)
        self.position += count

    def time(self, tokens: int) -> float:
        begun = time.perf_counter()
        for _ in range(tokens):
            self.step()
        return (time.perf_counter() - begun) / tokens


def measure(
    shape: dict[str, Any], kinds: tuple[str, ...], rounds: int, threads: int, peers: dict[str, Callable[[int], float]]
) -> dict[str, Any]:
    """Case → seconds per token, bytes, GB/s; and what only reading gives."""
    cases = plans(shape, kinds)
    sizes: dict[str, list[int]] = {kind: [0, 0] for kind in TYPES}
    parameters = {}
    for name, (kind, arguments) in cases.items():
        builder = Builder(kind, None)
        settings = builder.model(shape, **arguments)
        parameters[name] = builder.parameters
        share = shape["layers"] if len(settings.layers) == 2 else 1  # of two layers the large matrices share memory
        for stored, (small, large) in builder.count.items():
            known = sizes[stored]
            sizes[stored] = [max(known[0], small), max(known[1], -(-large // share) + LARGE)]
    pools = {kind: Pool(kind, *size) for kind, size in sizes.items() if size[0] + size[1] > 2 * LARGE}
    running: dict[str, Case] = {}
    for name, (kind, arguments) in cases.items():
        for pool in pools.values():
            pool.restart()
        settings = Builder(kind, pools).model(shape, **arguments)
        running[name] = Case(settings, rounds, shape["tokens"], threads)
    seconds: dict[str, list[float]] = {name: [] for name in [*running, *peers]}
    units = {name: (case.engine.units_read, case.engine.units_skipped) for name, case in running.items()}
    reading = []
    for number in range(rounds + 1):  # the first one warms up
        for name, case in running.items():
            seconds[name].append(case.time(shape["tokens"]))
        for name, peer in peers.items():
            seconds[name].append(peer(shape["tokens"]))
        if number:
            reading.append(_native.read_bandwidth(1 << 29, threads, 2) / 1e9)
    found: dict[str, Any] = {}
    for name, case in running.items():
        read, skipped = (b - a for a, b in zip(units[name], _counts(case), strict=True))
        (kind, arguments), taken = cases[name], statistics.median(seconds[name][1:])
        row = shape["hidden"] * {"f32": 4, "bf16": 2, "int8": 1}[kind]
        per_token = skipped / ((rounds + 1) * shape["tokens"])
        cache = 2 * 4 * shape["layers"] * shape["hidden"] * (PROMPT + (rounds / 2 + 1) * shape["tokens"])
        bytes_read = case.engine.weight_bytes - per_token * row + cache
        found[name] = {
            "seconds": taken, "fastest": min(seconds[name][1:]), "slowest": max(seconds[name][1:]),
            "bytes": case.engine.weight_bytes, "bytes_read": bytes_read, "gb_s": bytes_read / taken / 1e9,
            "d_ff": arguments["d_ff"], "parameters": parameters[name],
            "of_reading": statistics.median(
                bytes_read / one / 1e9 / all_read
                for one, all_read in zip(seconds[name][1:], reading, strict=True)
            ),
            "units_at_zero": skipped / (read + skipped) if read + skipped else 0.0,
        }  # fmt: skip
    for name in peers:
        found[name] = {"seconds": statistics.median(seconds[name][1:]), "fastest": min(seconds[name][1:])}

    def ratio(one: str, other: str) -> float:
        """How much longer ``one`` takes."""
        return statistics.median(a / b for a, b in zip(seconds[one][1:], seconds[other][1:], strict=True))

    for name in peers:
        found[name]["over_dense_f32"] = ratio("dense f32", name)
    for kind in kinds:
        dense = found[f"dense {kind}"]
        for name, (other, _) in cases.items():
            if other == kind:
                found[name]["over_dense"] = ratio(f"dense {kind}", name)
                found[name]["over_dense_f32"] = ratio("dense f32", name)
                found[name]["bytes_under_dense"] = dense["bytes_read"] / found[name]["bytes_read"]
    return {"cases": found, "read_gb_s": statistics.median(reading), "read_gb_s_best": max(reading),
            "threads": threads, "rounds": rounds, "layers": shape["layers"], "tokens": shape["tokens"]}  # fmt: skip


def _counts(case: Case) -> tuple[int, int]:
    return case.engine.units_read, case.engine.units_skipped


def show(title: str, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    reading = f"reading {found['read_gb_s']:.1f} GB/s (best {found['read_gb_s_best']:.1f})"
    table = Table(
        "", "ms/token", "MB", "GB/s", "of reading", "× dense", "of bytes", "× dense f32", title=f"{title}, {reading}"
    )
    for name, one in found["cases"].items():
        cells = [
            f"{1e3 * one['seconds']:.2f}",
            f"{one.get('bytes_read', one['bytes']) / 1e6:.1f}",
            f"{one['gb_s']:.1f}",
        ]
        if "over_dense" in one:
            share = f"{one['over_dense'] / one['bytes_under_dense']:.0%} of {one['bytes_under_dense']:.1f}"
            cells += [f"{one['of_reading']:.0%}", f"{one['over_dense']:.2f}", share]
        else:
            cells += ["", "", ""]
        table.add_row(name, *cells, f"{one['over_dense_f32']:.2f}")
    Console(width=120).print(table)


def llama_cpp(python: str, folder: Path, threads: int) -> tuple[Worker, int]:
    """A Llama shape in F32 of the bytes of the dense 800m, and how many of them a token reads."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2736, "num_attention_heads": 16,
             "num_key_value_heads": 16, "vocab_size": 32000}  # fmt: skip
    file = folder / "F32.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        code = "import sys, json; from pathlib import Path; from gguf_model import write_f32\n"
        code += "write_f32(Path(sys.argv[1]), json.loads(sys.argv[2]))"
        command = [python, "-c", code, str(file.resolve()), json.dumps(shape)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent)
    worker = Worker(python, "llama.cpp", str(file), str(threads))
    # Of the embedding a token reads one row.
    return worker, worker.bytes - 4 * shape["vocab_size"] * shape["hidden_size"]


def decode(arguments: argparse.Namespace, cells: Cells) -> None:
    """The two shapes, anew."""
    for name in arguments.shapes:
        peers: dict[str, Callable[[int], float]] = {}
        bytes_of_peer = 0
        if arguments.peer_python and name == "800m":
            worker, bytes_of_peer = llama_cpp(arguments.peer_python, arguments.folder, arguments.threads)
            peers["llama.cpp F32"] = lambda count, worker=worker: worker.time("decode", count) / count
        found = measure(SHAPES[name], tuple(arguments.kinds), arguments.rounds, arguments.threads, peers)
        for peer in peers:
            one = found["cases"][peer]
            one |= {"bytes": bytes_of_peer, "gb_s": bytes_of_peer / one["seconds"] / 1e9}
            worker.process.kill()
        if not arguments.dry:
            cells.all.pop(f"decode/{name}", None)
            cells.make(f"decode/{name}", lambda found=found: found)
        show(name, found)


def widths(arguments: argparse.Namespace, cells: Cells) -> None:
    """Milliseconds per layer against d, anew."""
    for d in arguments.widths:
        layer = 4 * (4 * d * d + 2 * d * 4 * d)
        shape = {"hidden": d, "heads": 16, "layers": max(2, -(-(1 << 30) // layer)), "vocabulary": 8, "S": 16, "N": 64,
                 "d_ff": {"dense": 4 * d}, "tokens": 4}  # fmt: skip
        found = measure(shape, ("f32",), arguments.rounds, arguments.threads, {})
        if not arguments.dry:
            cells.all.pop(f"widths/{d}", None)
            cells.make(f"widths/{d}", lambda found=found: found)
        show(f"d {d}, {shape['layers']} layers", found)


def draw(arguments: argparse.Namespace, cells: Cells) -> None:
    """Seconds per token against d, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    arguments.pictures.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    known = {int(key.split("/")[1]): cell for key, cell in cells.all.items() if key.startswith("widths/")}
    places = sorted(known)
    for case in CASES:
        times = [1e3 * known[d]["cases"][f"{case} f32"]["seconds"] / known[d]["layers"] for d in places]
        axes.loglog(places, times, "o-", label=case)
    axes.set_xticks(places, [str(d) for d in places])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("d")
    axes.set_ylabel("milliseconds per token and layer")
    axes.set_title("Engine, float32, 2 threads, equal parameters", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(arguments.pictures / "scaling_engine.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "widths", "draw"))
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--widths", nargs="*", type=int, default=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python")
    parser.add_argument("--folder", type=Path, default=Path("build/scaling-gguf"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()

    from tulle import machine

    cells = Cells(arguments.out, machine=machine.describe())
    {"decode": decode, "widths": widths, "draw": draw}[arguments.what](arguments, cells)


if __name__ == "__main__":
    main()
