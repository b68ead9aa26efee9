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
    Layer,
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
    layer = Layer(Group([], [linear(8, 8) for _ in "qkv"]), Group([], [linear(8, 8)]), feed_forward, norm, norm)
    table = Table(WeightKind.F32, np.full(12 * 8, 0.1, np.float32))
    return Model(8, 1, 1, 8, 12, "silu", [RotaryTable([0.5] * 4, 1.0, False)], Grid(), Grid(), Grid(), None, table,
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
    ],
)
def test_refused(change: Change, message: str) -> None:
    model = small()
    change(model)
    with pytest.raises(ValueError, match=message):
        engine(model)
