"""What the fuzzer (fuzz/engine.cpp) and a reading of check() found: each is refused before a kernel sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tulle import _native
from tulle.engine.checkpoint import StoredLinear
from tulle.engine.layout import for_kernels
from tulle.engine.native_model import (
    FeedForward,
    Grid,
    Group,
    InputGate,
    Layer,
    LayerInputs,
    Linear,
    Model,
    Norm,
    RotaryTable,
    Table,
    Transform,
    WeightKind,
)

Change = Callable[[Model], None]


def linear(rows: int, columns: int) -> Linear:
    facts, arrays = for_kernels(StoredLinear(np.full((rows, columns), 0.1, np.float32)))
    names = ("values", "masks", "offsets", "starts", "scales", "zeros", "minima")
    return Linear(facts, *(arrays.get(name) for name in names), None, Grid(), False, None)  # type: ignore[arg-type]


def small() -> Model:
    """Of float weights: hidden 8, one head."""
    ones = np.ones(8, np.float32)
    wide = Group([], [linear(16, 8), linear(16, 8)])
    norm = Norm(ones, None, 1e-6, False)
    feed_forward = FeedForward(16, wide, Group([], [linear(8, 16)]))
    qkv, o = Group([], [linear(8, 8) for _ in "qkv"]), Group([], [linear(8, 8)])
    layer = Layer(qkv, o, feed_forward, norm, norm, kv_heads=1, head_dim=8)
    table = Table(WeightKind.F32, np.full(12 * 8, 0.1, np.float32))
    return Model(8, 1, 0, 0, 12, "silu", [RotaryTable([0.5] * 4, 1.0, False)], Grid(), Grid(), Grid(), [], table,
                 [layer], norm, Group([], [linear(12, 8)]), None)  # fmt: skip


def engine(model: Model) -> object:
    return _native.Engine(model, pages=1, slots=1, context=16, batch=2, cache="f32", threads=1)


def test_the_small_model_runs() -> None:
    zero, logits = np.zeros(1, np.int32), np.empty((1, 12), np.float32)
    engine(small()).forward(zero, zero, zero, zero[None], zero, logits)  # type: ignore[attr-defined]
    assert np.isfinite(logits).all()


def first_linear(**facts: int) -> Change:
    def change(model: Model) -> None:
        of = model.layers[0].qkv.linears
        of[0] = replace(of[0], facts=replace(of[0].facts, **facts))

    return change


def overflow(model: Model) -> None:
    """Sizes whose product leaves 64 bits: of 2^24 rows of 2^39 floats it was 0, and 64 bytes were weights enough."""
    of = model.head.linears
    facts = replace(of[0].facts, rows=1 << 24, segment=512, segments=1 << 30, segments_per_scale=1 << 30)
    of[0] = replace(of[0], facts=facts, values=np.zeros(64, np.uint8))


def input_grid(model: Model) -> None:
    of = model.layers[0].qkv.linears
    of[0] = replace(of[0], input=Grid(62))


def transform(**settings: object) -> Change:
    def change(model: Model) -> None:
        numbers = np.ones(8, np.float32)
        model.layers[0].qkv.transforms.append(replace(Transform("diagonal", 8, numbers=numbers), **settings))

    return change


def side_by_side(model: Model) -> None:
    model.parallel, model.layers[0].input_norm = True, None


def gate(model: Model) -> None:
    """Of inputs that nothing gives."""
    norm = model.norm
    model.layers[0].input_gate = InputGate(Group([], [linear(4, 8)]), Group([], [linear(8, 4)]), norm)


def inputs(rows: int, width: int = 4) -> Change:
    """Of a layer's own, from a table of so many numbers."""

    def change(model: Model) -> None:
        gate(model)
        table = Table(WeightKind.F32, np.zeros(rows * 4, np.float32))
        norm = Norm(np.ones(width, np.float32), None, 1e-6, False)
        model.layer_inputs = LayerInputs(width, table, Group([], [linear(4, 8)]), norm)

    return change


def test_inputs_of_a_layer_s_own_run() -> None:
    model = small()
    inputs(12)(model)
    zero, logits = np.zeros(1, np.int32), np.empty((1, 12), np.float32)
    engine(model).forward(zero, zero, zero, zero[None], zero, logits)  # type: ignore[attr-defined]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overflow, "inputs of all segments"),
        (first_linear(segments=1 << 30, segments_per_scale=1 << 30), "inputs of all segments"),
        (input_grid, "bits of a grid"),
        (lambda m: setattr(m, "query", Grid(62)), "bits of a grid"),
        (lambda m: setattr(m, "key", Grid(-3)), "bits of a grid"),
        # A cache of 8 bits holds no more.
        (lambda m: setattr(m, "value", Grid(16)), "bits of a grid"),
        (transform(numbers=None), "numbers of a transform"),
        (transform(numbers=np.ones(7, np.float32)), "numbers of a transform"),
        (transform(kind="permutation", numbers=None), "index of a transform"),
        (transform(kind="permutation", numbers=None, index=np.full(8, 8, np.int32)), "index of a permutation"),
        (transform(kind="permutation", numbers=None, index=np.full(8, -1, np.int32)), "index of a permutation"),
        (transform(kind="hadamard", block=3, numbers=None), "divisor"),
        (transform(kind="hadamard", block=8, base=0, numbers=None), "power of two"),
        (transform(kind="block_matrix", block=4), "numbers of a transform"),
        (transform(kind="kronecker", left=4, right=4), "right factor"),
        (transform(kind="kronecker", left=0, right=8), "divisor"),
        (lambda m: setattr(m, "norm_all_heads", True), "norms of all queries and keys"),
        (side_by_side, "side by side"),
        (lambda m: setattr(m.layers[0], "rotary", 1), "rotary tables"),
        (lambda m: m.rotary[0].frequencies.append(0.5), "frequencies, at most half"),
        (lambda m: setattr(m.layers[0], "kv_from", 0), "linears of a group"),
        (lambda m: (setattr(m.layers[0], "kv_from", 0), m.layers[0].qkv.linears.__delitem__(slice(1, 3))), "earlier"),
        (lambda m: setattr(m.layers[0], "kv_heads", 3), "left over by KV heads"),
        (lambda m: setattr(m.layers[0], "kv_heads", 0), "KV heads"),
        (lambda m: setattr(m.layers[0], "head_dim", 7), "even head_dim"),
        (gate, "inputs of every layer's own"),
        (inputs(11), "48 elements, found 44"),
        (inputs(12, width=8), "96 elements, found 48"),
    ],
)
def test_refused(change: Change, message: str) -> None:
    model = small()
    change(model)
    with pytest.raises(ValueError, match=message):
        engine(model)
