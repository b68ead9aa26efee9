"""The KV cache in pages: where they lie and who shares them changes nothing, and what cannot be is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_engines import Runner, decoder, scaling_transformer
from transformers import AutoModelForCausalLM

from checkpoints import VOCABULARY, write_checkpoint
from family_folders import write_family
from tulle.engine.native_model import Grid, Model
from tulle.models.scaling_transformer import ScalingTransformerConfig, ScalingTransformerForCausalLM

CACHES = ["f32", "bf16", "int8", "int4"]
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 60).tolist()
OTHER = np.random.default_rng(1).integers(0, VOCABULARY, 60).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    write_checkpoint(path, head_dim=20)  # of no whole vectors
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return decoder(folder)


@pytest.mark.parametrize("cache", CACHES)
def test_where_pages_lie_changes_nothing(model: Model, cache: str) -> None:
    expected = Runner(model, cache=cache).forward(IDS)
    engine = Runner(model, cache=cache)
    engine.forward(OTHER, 1)  # pages are not new
    tables = [[], [], [7, 2, 5, 11]]
    found = [engine.forward(IDS[at : at + 13], 2, at, tables) for at in range(0, 60, 13)]
    assert np.array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_sequences_share_pages(model: Model, cache: str) -> None:
    """Three continue one prefix in one pass, one of them in a copy of a page that was begun."""
    engine = Runner(model, cache=cache)
    alone = [
        Runner(model, cache=cache).forward(IDS[:40] + more)[40:] for more in (OTHER[:9], OTHER[9:18], OTHER[20:29])
    ]
    engine.forward(IDS[:40], 0, 0, [[3, 8, 1]])
    engine.native.copy_page(1, 6)
    engine.native.copy_page(1, 0)
    slots, positions = np.repeat([0, 1, 2], 9), np.tile(np.arange(40, 49), 3)
    more = OTHER[:9] + OTHER[9:18] + OTHER[20:29]
    found = engine.forward(more, slots, positions, [[3, 8, 6, 9], [3, 8, 1, 7], [3, 8, 0, 10]])
    assert np.array_equal(found, np.concatenate(alone))


def test_codes_are_exact_on_grids_of_the_model(model: Model) -> None:
    """Of 4 bits or fewer for int4, of 8 for int8; finer grids are rounded again."""

    def logits(cache: str, key: Grid, value: Grid) -> np.ndarray:
        # Of one layer: in a second one, a sum that differs in its last bit may be rounded the other way.
        return Runner(replace(model, key=key, value=value, layers=model.layers[:1]), cache=cache).forward(IDS)

    for bits, exact in ((2, CACHES[2:]), (4, CACHES[2:]), (5, ["int8"]), (8, ["int8"])):
        grids = Grid(bits, False, 0.9), Grid(bits, True, 1.0)
        expected = logits("f32", *grids)
        for cache in ("int8", "int4"):
            off = np.abs(logits(cache, *grids) - expected).max() / np.abs(expected).max()
            assert (off < 1e-5) == (cache in exact), (bits, cache)
    plain = logits("f32", Grid(), Grid())
    off = {cache: np.abs(logits(cache, Grid(), Grid()) - plain).max() / np.abs(plain).max() for cache in CACHES}
    assert off["f32"] == 0 < off["bf16"] < off["int8"] < off["int4"] < 0.3


@pytest.mark.parametrize("count", [1, 30])
def test_embeddings_are_the_hidden_states_before_the_head(folder: Path, model: Model, count: int) -> None:
    torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = torch_model.model(torch.tensor([IDS[:count]]), use_cache=False).last_hidden_state[0].numpy()
    for threads in (1, 2):
        engine = Runner(model, threads=threads)
        found = engine.embed(IDS[:count])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        # Keys and values are kept as by forward.
        other = Runner(model, threads=threads)
        other.forward(IDS[:count])
        assert np.array_equal(engine.forward(IDS[count : count + 1], 0, count), other.forward([IDS[count]], 0, count))
        assert np.array_equal(engine.embed(IDS[:count], rows=[count - 1]), found[-1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tables": [[]]}, "page of block 0 of slot 0: expected 0 to 11, found -1"),
        ({"tables": [[12]]}, "page of block 0 of slot 0: expected 0 to 11, found 12"),
        ({"positions": 20, "tables": [[-1, 2]]}, "page of block 0 of slot 0: expected 0 to 11, found -1"),
        ({"positions": 20, "tables": [[2, 2]]}, "block 1 of slot 0: expected one of its own.*found 2, which block 0"),
        ({"slots": [0, 1], "positions": [3, 3], "tables": [[4], [4]]}, "block 0 of slot 1.*which block 0 of slot 0"),
        # One reads what the other writes.
        (
            {"slots": [0, 1], "positions": [3, 20], "tables": [[4], [4, 5]]},
            "block 0 of slot 0.*which block 0 of slot 1",
        ),
        ({"positions": [5, 5]}, "positions of slot 0: expected each once, found 5 twice"),
        ({"positions": [63, 64]}, "expected positions below 64 and at least 0, found 64"),
        ({"slots": [0, 3]}, "expected slots below 3"),
        ({"tokens": [1, VOCABULARY]}, f"expected tokens below {VOCABULARY}"),
        ({"rows": [1, 0]}, "rising rows"),
        ({"rows": [2]}, "expected rows below 2"),
    ],
)
def test_refused(model: Model, arguments: dict[str, Any], message: str) -> None:
    engine = Runner(model)
    before = engine.forward(IDS)
    with pytest.raises(ValueError, match=message):
        engine.forward(**({"tokens": [1, 2]} | arguments))
    engine.forward([1], positions=60)  # it left no trace
    assert np.array_equal(engine.forward(IDS), before)


def test_bad_sizes_and_pages(model: Model) -> None:
    engine = Runner(model)
    for call, message in (
        (lambda: Runner(model, pages=0), "pages of 1, at most"),
        (lambda: Runner(model, slots=0), "slots of 1, at most"),
        (lambda: Runner(model, pages=1 << 31), "pages of 1, at most"),
        (lambda: Runner(model, pages=(1 << 31) - 1), "expected as many as memory has room for, found 2147483647"),
        (lambda: engine.native.copy_page(0, 12), "pages, fewer than: expected 12, found 12"),
        (lambda: engine.native.copy_page(12, 0), "pages, fewer than"),
        (lambda: engine.native.save_state(0, 0), "recurrent state: expected a model that has one"),
        (lambda: engine.native.load_state(0, 0), "recurrent state: expected a model that has one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
    narrow = np.zeros((3, 3), np.int32)
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"tables \[slots\]\[context / 16\] of 3 x 4, found 3 x 3"):
        engine.native.forward(one, one, one, narrow, one, np.empty((1, VOCABULARY), np.float32))


def test_bytes(model: Model) -> None:
    """A page holds 16 tokens of every layer; int4 pads values to 32 channels, and codes have four numbers a token."""
    heads = 16 * sum(layer.kv_heads for layer in model.layers)
    for cache, each in (("f32", 8 * 20), ("bf16", 4 * 20), ("int8", 2 * 20 + 16), ("int4", 10 + 16 + 16)):
        native = Runner(model, cache=cache).native
        assert (native.page_bytes, native.cache_bytes, native.state_bytes) == (heads * each, 12 * heads * each, 0)


def test_two_threads_take_turns(model: Model) -> None:
    engine = Runner(model, threads=2)
    prompts = [IDS, OTHER]
    expected = [Runner(model, threads=2).forward(ids) for ids in prompts]
    wrong = []

    def run(slot: int) -> None:
        for _ in range(30):
            found = np.concatenate([engine.forward(prompts[slot][at : at + 12], slot, at) for at in range(0, 60, 12)])
            if not np.array_equal(found, expected[slot]):
                wrong.append(slot)

    threads = [threading.Thread(target=run, args=(slot,)) for slot in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def recurrent(folder: Path, kind: str = "scaling") -> Runner:
    if kind == "delta":
        return Runner(decoder(write_family(folder / "m", "qwen3_5_text", 2)), snapshots=2)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.3, "ff_block": 8, "qkv_modules": 4,
    }  # fmt: skip
    ScalingTransformerForCausalLM(ScalingTransformerConfig(**settings)).save_pretrained(folder)
    return Runner(scaling_transformer(folder), snapshots=2)


@pytest.mark.parametrize("kind", ["scaling", "delta"])
@pytest.mark.parametrize("position", [16, 17, 33])
def test_a_sequence_goes_on_from_a_snapshot(tmp_path: Path, position: int, kind: str) -> None:
    ids, engine = [i % 48 for i in IDS], recurrent(tmp_path, kind)
    expected = engine.forward(ids)
    engine.forward(ids[:position], 0)
    engine.native.save_state(0, 1)
    engine.forward(ids[position:], 0, position)
    engine.forward([i % 48 for i in OTHER], 1)
    with pytest.raises(ValueError, match=f"expected 60 or a start at 0, found {position}"):
        engine.forward(ids[position:], 1, position)
    engine.native.load_state(1, 1)
    # Pages of the prefix are shared, the one that was begun is copied.
    whole = position // 16
    if position % 16:
        engine.native.copy_page(whole, 8)
    row = [*range(whole), 8, 9, 10][:4]
    assert np.array_equal(engine.forward(ids[position:], 1, position, [[], row]), expected[position:])


def test_snapshots_that_are_not_there(tmp_path: Path) -> None:
    engine = recurrent(tmp_path)
    assert engine.native.state_bytes == 4 * 2 * 2 * 6 * 8  # two layers, two tokens, 4 + 2 modules of 8
    for call, message in (
        (lambda: engine.native.load_state(0, 0), "snapshot 0: expected one that was saved"),
        (lambda: engine.native.save_state(0, 2), "snapshots, fewer than: expected 2, found 2"),
        (lambda: engine.native.save_state(3, 0), "slots, fewer than: expected 3, found 3"),
        (lambda: engine.native.load_state(2, 0), "snapshots, fewer than"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
