"""Linears that see a part of their inputs: the engine against the simulated torch model, and its layouts against each
other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import logits_by_isa
from transformers import AutoModelForCausalLM

import tulle.hf  # noqa: F401 (registers the packed format)
from tiny_models import write_model
from tulle._native import top_k as native_top_k
from tulle.engine import Engine, choose
from tulle.engine.checkpoint import Source
from tulle.engine.layout import ModelLayout
from tulle.engine.prepare import fused_linears
from tulle.errors import UserError
from tulle.format.spec import InputSparsitySpec

SEQUENCES = np.random.default_rng(0).integers(0, 128, (12, 6))
IDS: list[int] = SEQUENCES.reshape(-1)[:40].tolist()
SELECTIONS: dict[str, dict[str, Any]] = {
    "half": {"kind": "top_k", "keep": 32},
    "of blocks": {"kind": "top_k", "keep": 6, "block": 16},
    "units": {"kind": "top_k", "keep": 16, "block": 32, "unit": 4},
    "units by norm": {"kind": "top_k", "keep": 32, "unit": 4, "by": "norm"},
    "weighted": {"kind": "top_k", "keep": 20, "weighted": True},
    "rescaled": {"kind": "top_k", "keep": 24, "rescale": True},
    "threshold": {"kind": "threshold", "threshold": 0.3},
    "threshold 0": {"kind": "threshold", "threshold": 0.0},
    "relu": {"kind": "relu", "rescale": True},
    "all": {"kind": "top_k", "keep": 64},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "f32": {"values_dtype": "float32", "sparse": True},
    "int4": {"bits": 4, "group_size": 32},
    "int4 asymmetric": {"bits": 4, "group_size": 16, "symmetric": False},
    "int4 sparse": {"bits": 4, "group_size": 64, "sparse": True},
    "int4 sparse asymmetric": {"bits": 4, "group_size": 64, "sparse": True, "symmetric": False},
    "int8": {"bits": 8},
    "int8 sparse": {"bits": 8, "group_size": 32, "sparse": True},
    "int2": {"bits": 2},
    "int3": {"bits": 3, "group_size": 64},
}


def write(folder: Path, weights: str, selection: str, **more: Any) -> None:
    scheme = WEIGHTS[weights] | more | {"input_sparsity": InputSparsitySpec(**SELECTIONS[selection])}
    write_model(folder, {"qkv": scheme, "o": scheme, "gate_up": scheme, "down": scheme})


def wanted(folder: Path) -> np.ndarray:
    """Logits of SEQUENCES."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(SEQUENCES), use_cache=False).logits.numpy()
    return logits


def logits_of(engine: Engine, prompt: int = SEQUENCES.shape[1]) -> np.ndarray:
    """The same by the engine, token by token after a prompt."""
    rows = []
    for ids in SEQUENCES.tolist():
        found = [engine.forward(ids[:prompt])]
        found += [engine.forward([t], 0, prompt + i) for i, t in enumerate(ids[prompt:])]
        rows.append(np.concatenate(found))
    return np.stack(rows)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest difference of the third best of twelve sequences, over the greatest logit. Numbers that differ in their
    last places now and then decide between two inputs, and what follows in that sequence is another."""
    worst = np.abs(found - expected).reshape(len(expected), -1).max(1)
    return float(np.sort(worst)[len(worst) // 4] / np.abs(expected).max())


@settings(deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([1, 4, 3]),
    st.floats(0, 1),
    st.sampled_from(["normal", "whole", "equal", "wide", "zeros"]),
    st.integers(0, 2**32 - 1),
)
def test_top_k_is_exact(units: int, unit: int, share: float, kind: str, seed: int) -> None:
    """Against a stable sort: so many, the largest, and the lower index among equals; units by their largest."""
    generator = np.random.default_rng(seed)
    n = units * unit
    x = generator.standard_normal(n).astype(np.float32)
    if kind == "whole":
        x = np.rint(3 * x)
    elif kind == "equal":
        x = np.sign(x)
    elif kind == "wide":
        x *= np.float32(10.0) ** generator.integers(-30, 30, n).astype(np.float32)
    elif kind == "zeros":
        x *= generator.random(n) < 0.3
    keep = max(1, round(share * units))
    kept = np.argsort(-np.abs(x.reshape(units, unit)).max(1), kind="stable")[:keep]
    expected = np.zeros_like(x)
    expected.reshape(units, unit)[kept] = x.reshape(units, unit)[kept]
    found = x.copy()
    native_top_k(found, keep * unit, unit=unit)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections(selection: str, tmp_path: Path) -> None:
    write(tmp_path / "m", "f32", selection)
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored")
    assert off(logits_of(engine), wanted(tmp_path / "m")) < 1e-5


@pytest.mark.parametrize("selection", ["half", "units by norm", "weighted", "threshold", "relu"])
@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name != "f32"])
@pytest.mark.parametrize("layout", ["sparse", "dense", "input-major", "dense input-major"])
def test_layouts(weights: str, selection: str, layout: str, tmp_path: Path) -> None:
    write(tmp_path / "m", weights, selection)
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored", layout=layout)
    expected = wanted(tmp_path / "m")
    assert off(logits_of(engine), expected) < 1e-3
    assert off(logits_of(engine, prompt=2), expected) < 1e-3


@pytest.mark.parametrize("weights", ["int4", "int4 sparse", "int2", "int8", "int4 asymmetric"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("selection", ["half", "units"])
def test_quantised_inputs(weights: str, bits: int, selection: str, tmp_path: Path) -> None:
    """Rounded first, then selected: among equal whole numbers the lower index stays."""
    write(tmp_path / "m", weights, selection, input_bits=bits)
    engine = Engine(tmp_path / "m", threads=1, cache="f32", head="as stored", layout="input-major")
    assert off(logits_of(engine), wanted(tmp_path / "m")) < 1e-3


@pytest.mark.parametrize("selection", ["half", "units"])
@pytest.mark.parametrize("weights", ["int4", "int4 sparse asymmetric", "int8 sparse", "int3"])
def test_input_major_is_tiles_bit_for_bit(weights: str, selection: str, tmp_path: Path) -> None:
    """Sums of whole numbers are equal, and segments alike where scales have few inputs."""
    write(tmp_path / "m", weights, selection)
    found = [
        Engine(tmp_path / "m", threads=1, cache="f32", head="as stored", layout=layout)
        for layout in ("sparse", "input-major", "dense input-major")
    ]
    for tokens in (1, 3, 30):
        first, *others = (engine.forward(IDS[:tokens]) for engine in found)
        assert all(np.array_equal(first, other) for other in others)


def test_long_prompts(tmp_path: Path) -> None:
    """More tokens than are multiplied with a line at once, in two passes, by threads that share a linear."""
    scheme = WEIGHTS["int4 sparse"] | {"input_sparsity": InputSparsitySpec(**SELECTIONS["half"])}
    write_model(tmp_path / "m", {"all": scheme}, max_position_embeddings=512)
    ids = np.random.default_rng(1).integers(0, 128, 300).tolist()
    tiles, *input_major = (
        Engine(tmp_path / "m", threads=n, cache="f32", head="as stored", layout=layout).forward(ids)
        for layout, n in (("sparse", 1), ("input-major", 1), ("input-major", 3))
    )
    assert np.array_equal(tiles, input_major[0])
    assert off(input_major[1], tiles) < 1e-5


@pytest.mark.parametrize("layout", ["input-major", "dense input-major"])
def test_threads_change_the_last_bits_alone(layout: str, tmp_path: Path) -> None:
    scheme = {"bits": 4, "group_size": 64, "sparse": True, "input_sparsity": InputSparsitySpec("top_k", keep=700)}
    write_model(tmp_path / "m", {"down": scheme}, intermediate_size=1536)
    one, two, again = (Engine(tmp_path / "m", n, cache="f32", head="as stored", layout=layout) for n in (1, 3, 3))
    found = two.forward(IDS)
    assert np.array_equal(found, again.forward(IDS))
    assert off(found, one.forward(IDS)) < 1e-5


def test_only_what_a_token_has_is_read(tmp_path: Path) -> None:
    write(tmp_path / "m", "int8", "half")
    skipping, all_of_it = (
        Engine(tmp_path / "m", 1, head="as stored", layout=layout) for layout in ("input-major", "sparse")
    )
    for engine in (skipping, all_of_it):
        engine.forward(IDS[:5])
        assert engine.take_bytes_per_token() == 0  # of passes of one token alone
        engine.forward([3], 0, 5)
    assert all_of_it.take_bytes_per_token() == all_of_it.weight_bytes
    # qkv and o read 32 of 64 inputs, gate and up too, down 32 of 192; outputs in lines of 64.
    left_out = 2 * ((3 * 64 + 64 + 2 * 192) * 32 + 64 * 160)
    assert skipping.take_bytes_per_token() == skipping.weight_bytes - left_out


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """With enough inputs for vectors and the few behind them."""
    chosen = InputSparsitySpec("top_k", keep=50, weighted=True)
    write_model(
        tmp_path / "m",
        {"all": {"bits": 4, "group_size": 37, "sparse": True, "input_sparsity": chosen}},
        hidden_size=148,
        intermediate_size=185,
        head_dim=37 * 2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    forward = "np.concatenate([engine.forward(list(range(30))), engine.forward([7], 0, 30)])"
    found = logits_by_isa(tmp_path / "m", tmp_path, forward, layout="input-major")
    for other in found[1:]:
        assert off(other, found[0]) < 1e-4


def test_auto_times_all_layouts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", "int4 sparse", "half")
    timed: list[list[str]] = []

    def faster(models: dict, *_: object) -> tuple[ModelLayout, dict]:
        timed.append([str(layout) for layout in models])
        return ModelLayout("dense input-major"), dict.fromkeys(models, 1.0)

    monkeypatch.setattr(choose, "faster", faster)
    for _ in range(2):
        assert Engine(tmp_path / "m", 1).layout == "dense input-major"
    assert timed == [["sparse", "dense", "input-major", "dense input-major"]]


def test_layouts_by_name(tmp_path: Path) -> None:
    write(tmp_path / "m", "int4 sparse", "half")
    with pytest.raises(UserError, match="expected a layout of auto, sparse, dense, input-major"):
        Engine(tmp_path / "m", 1, layout="rows")
    with pytest.raises(UserError, match="found 'dense columns'; its name is dense input-major now"):
        Engine(tmp_path / "m", 1, layout="dense columns")


@pytest.mark.parametrize("weights", ["int4", "int4 sparse asymmetric", "int8", "int2", "int8 sparse"])
@pytest.mark.parametrize("layout", ["input-major", "dense input-major"])
def test_linears_that_see_the_same_inputs_are_fused(weights: str, layout: str, tmp_path: Path) -> None:
    scheme = WEIGHTS[weights] | {"input_sparsity": InputSparsitySpec(**SELECTIONS["half"])}
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "attention_bias": True}
    write_model(tmp_path / "m", dict.fromkeys(("qkv", "o", "gate_up", "down"), scheme), **wide)
    fused = fused_linears(Source(tmp_path / "m"), ModelLayout(layout), [1])
    parts = [[name.rpartition(".")[2] for name in names] for names in fused]
    qkv, gate_up = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if "sparse" in weights and layout == "input-major":  # pruned ones stay alone
        assert parts == [[name] for name in [*qkv, "o_proj", *gate_up, "down_proj"]]
    elif weights == "int2":  # 128 outputs are not a whole line
        assert parts == [*([name] for name in qkv), ["o_proj"], gate_up, ["down_proj"]]
    else:
        assert parts == [qkv, ["o_proj"], gate_up, ["down_proj"]]
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored", layout=layout)
    expected = wanted(tmp_path / "m")
    assert off(logits_of(engine), expected) < 1e-3
    assert off(logits_of(engine, prompt=2), expected) < 1e-3


@pytest.mark.parametrize("selection", ["half", "units by norm"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_linears_of_a_group_in_different_layouts(selection: str, sparse: bool, threads: int, tmp_path: Path) -> None:
    """The same inputs in tiles and input-major: pruned 8-bit weights are never input-major."""
    chosen = InputSparsitySpec(**SELECTIONS[selection])
    schemes = {
        role: {"bits": 4, "group_size": 32, "sparse": sparse, "input_sparsity": chosen} for role in ("qkv", "gate_up")
    }
    tiles = {"bits": 8, "group_size": 32, "sparse": True, "input_sparsity": chosen}
    write_model(tmp_path / "m", schemes | {"q_proj": tiles, "up_proj": tiles})
    engine = Engine(tmp_path / "m", threads=threads, cache="f32", head="as stored", layout="input-major")
    expected = wanted(tmp_path / "m")
    assert off(logits_of(engine), expected) < 1e-3
    assert off(logits_of(engine, prompt=2), expected) < 1e-3


def test_blocks_of_4_across_scales_are_not_blocks_of_the_layout(tmp_path: Path) -> None:
    """Groups of 6 inputs, padded apart: blocks of 4 of them are none of the layout."""
    scheme = {"bits": 4, "group_size": 6, "input_sparsity": InputSparsitySpec("top_k", keep=24, unit=4)}
    write_model(tmp_path / "m", {"qkv": scheme, "gate_up": scheme}, hidden_size=48, head_dim=12)
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored", layout="input-major")
    assert off(logits_of(engine, prompt=2), wanted(tmp_path / "m")) < 1e-3


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", ["sparse", "input-major"])
def test_a_token_alone_is_a_token_of_many(layout: str, threads: int, tmp_path: Path) -> None:
    """However KV heads and threads divide each other, with several blocks of queries per KV head."""
    scheme = WEIGHTS["int4"] | {"input_sparsity": InputSparsitySpec(**SELECTIONS["units by norm"])}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}
    write_model(tmp_path / "m", {"qkv": scheme, "gate_up": scheme, "down": scheme}, hidden_size=96, **heads)
    engine = Engine(tmp_path / "m", threads=threads, cache="f32", head="as stored", layout=layout)
    assert off(logits_of(engine, prompt=1), logits_of(engine)) < 1e-5


def test_pruned_blocks_of_4_are_fused(tmp_path: Path) -> None:
    scheme = WEIGHTS["int4 sparse"] | {"input_sparsity": InputSparsitySpec("top_k", keep=32, unit=4)}
    write_model(tmp_path / "m", {"all": scheme}, hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    assert [len(names) for names in fused_linears(Source(tmp_path / "m"), ModelLayout.INPUT_MAJOR, [0])] == [3, 1, 2, 1]
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored", layout="input-major")
    assert off(logits_of(engine), wanted(tmp_path / "m")) < 1e-3


def test_linears_of_different_selections_are_not_fused(tmp_path: Path) -> None:
    schemes = {
        role: WEIGHTS["int4"] | {"input_sparsity": InputSparsitySpec(**SELECTIONS["half"])} for role in ("qkv", "o")
    }
    schemes["gate_up"] = WEIGHTS["int4"] | {"input_sparsity": InputSparsitySpec(**SELECTIONS["weighted"])}
    write_model(tmp_path / "m", schemes, hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"]["linears"]["model.layers.1.self_attn.v_proj"]["input_sparsity"]["keep"] = 48
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    source = Source(tmp_path / "m")
    assert [len(names) for names in fused_linears(source, ModelLayout.INPUT_MAJOR, [0])] == [3, 1, 1, 1, 1]
    assert [len(names) for names in fused_linears(source, ModelLayout.INPUT_MAJOR, [1])] == [1, 1, 1, 1, 1, 1, 1]
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored", layout="input-major")
    assert off(logits_of(engine), wanted(tmp_path / "m")) < 1e-3
