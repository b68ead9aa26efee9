"""Decoding with codes of 2 to 8 bits: tokens/s, GB/s, and the time that a byte takes beside 4 bits.

    python benchmarks/low_bits.py [--shapes 1.1b 135m] [--bits 2 3 4 5 6 8] [--inputs 16] [--scale-bits 16]

Random weights in memory, groups of 128 inputs (135m: 64), embedding and head in codes of as many bits as the linears.
1.1b: 22 layers of d 2048, far larger than any cache. 135m: 30 layers of d 576, tied, which a large level-3 cache holds.
All models live in one process; a round decodes some tokens with each in turn. Medians; of ratios those of the rounds'
ratios. ``--inputs``: bits of the inputs, 16 (two planes) or 8. The machine must be idle. A token costs more than its
bytes (attention, norms, waiting for each other): `rest` is what it takes where weights cost nothing, from a line
through the times of 4 and 8 bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cells  # noqa: E402
from tulle import _native  # noqa: E402
from tulle.engine.files import huge  # noqa: E402
from tulle.engine.layout import BITS, SLACK, TILE, geometry, segment_step, tiles_kind  # noqa: E402
from tulle.engine.native_model import (  # noqa: E402
    FeedForward,
    Grid,
    Group,
    Layer,
    Layout,
    Linear,
    LinearFacts,
    Model,
    Norm,
    RotaryTable,
    ScaleKind,
    consecutive_pages,
)
from tulle.format.pack import f32_to_bf16  # noqa: E402

RESULTS = Path(__file__).parent / "results/low_bits.json"
SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {"hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 4, "layers": 22, "vocabulary": 32000,
             "group": 128, "tied": False, "tokens": 6},
    "135m": {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "layers": 30, "vocabulary": 49152,
             "group": 64, "tied": True, "tokens": 40},
}  # fmt: skip
PROMPT, CONTEXT, ROUNDS = 16, 256, 15


class Weights:
    """Random linears of one model, all of the same kind of codes, one behind the other as in the engine's file."""

    def __init__(self, shape: dict[str, Any], bits: int, inputs: int, scale_bits: int):
        self.bits, self.group, self.inputs, self.scale_bits = bits, shape["group"], inputs, scale_bits
        width = BITS[tiles_kind(bits, False, self.group)]
        d, kv = shape["hidden"], shape["hidden"] // shape["heads"] * shape["kv_heads"]
        layer = 2 * d * (d + kv) + 3 * d * shape["intermediate"]
        numbers = shape["layers"] * layer + (1 if shape["tied"] else 2) * d * shape["vocabulary"]
        self._memory, self._taken = huge(numbers * (width + 1) // 8 + (1 << 24)), 0
        block = np.random.default_rng(0).integers(0, 256, (1 << 20) + 7, np.uint8)
        for start in range(0, len(self._memory), len(block)):
            self._memory[start : start + len(block)] = block[: len(self._memory) - start]

    def _take(self, count: int) -> Any:
        self._taken += count + -count % 64
        return self._memory[self._taken - (count + -count % 64) : self._taken][:count]

    def _kept(self, numbers: Any) -> Any:
        found = self._take(numbers.nbytes).view(numbers.dtype)
        found[:] = numbers
        return found

    def linear(self, rows: int, columns: int) -> Linear:
        kind = tiles_kind(self.bits, False, self.group)
        cut = geometry((rows, columns), columns // self.group, TILE, segment_step(kind))
        values = self._take(cut.tiles * TILE * cut.padded * BITS[kind] // 8 + SLACK)
        step = 0.04 / (1 << self.bits)
        scales: Any = f32_to_bf16(np.full(cut.tiles * TILE * cut.scales, step, np.float32))
        rows_of = None
        if self.scale_bits == 8:
            scales, rows_of = np.full(scales.shape, 255, np.uint8), np.full(cut.tiles * TILE, step / 255, np.float32)
        facts = LinearFacts(
            kind, Layout.TILES, rows, columns, cut.segment, cut.segments, cut.segments_per_scale, 1 << (self.bits - 1),
            ScaleKind.of(scales),
        )  # fmt: skip
        return Linear(
            facts=facts, values=values, scales=self._kept(scales), row_scales=rows_of, input=Grid(self.inputs),
            masks=None, offsets=None, starts=None, zeros=None, minima=None, bias=None, engine_grid=True, selection=None,
        )  # fmt: skip


def model_of(shape: dict[str, Any], weights: Weights) -> Model:
    d, wide, head_dim = shape["hidden"], shape["intermediate"], shape["hidden"] // shape["heads"]
    norm, kv = Norm(np.ones(d, np.float32), None, 1e-5, False), shape["kv_heads"] * head_dim
    layers = [
        Layer(
            input_norm=norm, post_norm=norm,
            qkv=Group([], [weights.linear(d, d), weights.linear(kv, d), weights.linear(kv, d)]),
            o=Group([], [weights.linear(d, d)]),
            feed_forward=FeedForward(
                intermediate=wide,
                gate_up=Group([], [weights.linear(wide, d), weights.linear(wide, d)]),
                down=Group([], [weights.linear(d, wide)]),
            ),
        )
        for _ in range(shape["layers"])
    ]  # fmt: skip
    head = weights.linear(shape["vocabulary"], d)
    return Model(
        hidden=d, heads=shape["heads"], kv_heads=shape["kv_heads"], head_dim=head_dim,
        vocabulary=shape["vocabulary"], gate="silu",
        rotary=[RotaryTable((1e4 ** (-np.arange(0, head_dim, 2) / head_dim)).tolist(), 1.0, False)],
        query=Grid(), key=Grid(), value=Grid(), head_rotation=None,
        embedding=head if shape["tied"] else weights.linear(shape["vocabulary"], d),
        layers=layers, norm=norm, head=Group([], [head]), exact_head=None,
    )  # fmt: skip


class Decoder:
    def __init__(self, model: Model, threads: int):
        self.vocabulary, self.tables = model.vocabulary, consecutive_pages(1, CONTEXT)
        self.native: Any = _native.Engine(model, self.tables.size, 1, CONTEXT, 64, "f32", threads)
        self.bytes = self.native.weight_bytes

    def run(self, tokens: int) -> float:
        """Seconds per token, after a prompt."""
        logits = np.empty((1, self.vocabulary), np.float32)
        self._forward(np.arange(PROMPT, dtype=np.int32), 0, logits)
        begun = time.perf_counter()
        for place in range(PROMPT, PROMPT + tokens):
            self._forward(np.array([place * 7919 % self.vocabulary], np.int32), place, logits)
        return (time.perf_counter() - begun) / tokens

    def _forward(self, tokens: Any, position: int, logits: Any) -> None:
        places = np.arange(position, position + len(tokens), dtype=np.int32)
        row = np.array([len(tokens) - 1], np.int32)
        self.native.forward(tokens, np.zeros(len(tokens), np.int32), places, self.tables, row, logits)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[name]
    decoders = {
        bits: Decoder(model_of(shape, Weights(shape, bits, options.inputs, options.scale_bits)), options.threads)
        for bits in options.bits
    }
    seconds: dict[int, list[float]] = {bits: [] for bits in decoders}
    for number in range(options.rounds + 1):
        for bits, decoder in decoders.items():
            took = decoder.run(shape["tokens"])
            if number:
                seconds[bits].append(took)
    read = _native.read_bandwidth(1 << 29, options.threads, 5) / 1e9
    middle = {bits: statistics.median(own) for bits, own in seconds.items()}
    weighs = {bits: decoder.bytes for bits, decoder in decoders.items()}
    rest = 0.0
    if 4 in middle and 8 in middle:
        rest = max(0.0, middle[4] - (middle[8] - middle[4]) / (weighs[8] - weighs[4]) * weighs[4])
    print(f"{name}, inputs of {options.inputs} bits, scales of {options.scale_bits}; memory when only reading: "
          f"{read:.1f} GB/s; rest: {1e3 * rest:.2f} ms")  # fmt: skip
    print("| bits | MB per token | tokens/s | GB/s | time per byte, 4 bits = 1 | without the rest |")
    print("|---|---|---|---|---|---|")
    rows = {}
    for bits, own in seconds.items():
        first = 4 if 4 in seconds else bits
        longer = weighs[first] / weighs[bits]
        ratio = statistics.median(a / b for a, b in zip(own, seconds[first], strict=True)) * longer
        bare = statistics.median((a - rest) / (b - rest) for a, b in zip(own, seconds[first], strict=True)) * longer
        rows[bits] = {"bytes": weighs[bits], "tokens_per_s": 1 / middle[bits], "time_per_byte": ratio, "bare": bare}
        speed = f"{1 / middle[bits]:.1f} | {weighs[bits] / middle[bits] / 1e9:.1f}"
        print(f"| {bits} | {weighs[bits] / 1e6:.0f} | {speed} | {ratio:.2f} | {bare:.2f} |")
    return {"read_gb_s": read, "rest_s": rest, "bits": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--bits", nargs="+", type=int, choices=range(2, 9), default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--inputs", type=int, choices=(8, 16), default=16)
    parser.add_argument("--scale-bits", type=int, choices=(8, 16), default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    cells = Cells(options.json)
    for name in options.shapes:
        key = f"{name}, inputs of {options.inputs}, scales of {options.scale_bits}, {_native.active_isa()}"
        cells.all[key] = measured(name, options)
        cells.write()


if __name__ == "__main__":
    main()
