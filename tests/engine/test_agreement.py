"""The engine against the simulated torch model: every stored scheme, architecture, transform and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isas import logits_by_isa
from transformers import AutoModelForCausalLM

import tulle
import tulle.hf  # noqa: F401 (registers the packed format)
from checkpoints import VOCABULARY, write_checkpoint
from random_decoders import FAMILIES
from tiny_models import write_model
from tulle.engine import Engine

SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {},
    "bf16 sparse": {"all": {"sparse": True, "values_dtype": "bfloat16"}},
    "f16 sparse": {"all": {"sparse": True, "values_dtype": "float16"}},
    "f32 2:4": {"all": {"sparse": True, "pattern": "2:4", "values_dtype": "float32"}},
    "int4": {"all": {"bits": 4, "group_size": 32}},
    "int4 asymmetric": {"all": {"bits": 4, "group_size": 16, "symmetric": False}},
    "int4 sparse": {"all": {"bits": 4, "group_size": 64, "sparse": True}},
    "int4 sparse asymmetric": {"all": {"bits": 4, "group_size": 64, "sparse": True, "symmetric": False}},
    "int8": {"all": {"bits": 8}},
    "int8 sparse": {"all": {"bits": 8, "sparse": True}},
    "int8 2:4": {"all": {"bits": 8, "sparse": True, "pattern": "2:4", "group_size": 16}},
    "int2 and 3": {"qkv": {"bits": 2, "group_size": 8}, "down": {"bits": 3, "group_size": 24, "symmetric": False}},
    "int6": {"all": {"bits": 6, "group_size": 32}},
    "w8a8": {"all": {"bits": 8, "input_bits": 8}},
    "w4a4 asymmetric": {"all": {"bits": 4, "input_bits": 4, "input_symmetric": False, "input_clip": 0.9}},
    "w8a8 asymmetric": {"all": {"bits": 8, "input_bits": 8, "input_symmetric": False}},
    "sparse w4a8": {"all": {"bits": 4, "group_size": 32, "input_bits": 8, "sparse": True}},
    "bf16 weights, 8-bit inputs": {"all": {"sparse": True, "values_dtype": "bfloat16", "input_bits": 8}},
    "mixed": {"qkv": {"bits": 4, "input_bits": 6}, "gate_up": {"bits": 8, "sparse": True}},
}


def wanted(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return logits


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", SCHEMES)
def test_stored_schemes(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m", SCHEMES[name])
    ids = np.random.default_rng(0).integers(0, 128, 40).tolist()
    expected = wanted(tmp_path / "m", ids)
    engine = Engine(tmp_path / "m", threads=2, cache="f32", head="as stored")
    # Whole numbers agree, and 16 bits stand for inputs that are left unquantised; where inputs are rounded, a sum that
    # differs in its last bit may be rounded the other way.
    limit = 1e-2 if any("input_bits" in scheme for scheme in SCHEMES[name].values()) else 1e-3
    assert off(engine.forward(ids), expected) < limit
    # One token at a time, after a prompt.
    steps = [engine.forward(ids[:7])] + [engine.forward([t], 0, 7 + i) for i, t in enumerate(ids[7:])]
    assert off(np.concatenate(steps), expected) < limit


ARCHITECTURES = [
    *((model_type, extra) for model_type in FAMILIES for extra in ({}, {"tie_word_embeddings": True})),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
]


@pytest.mark.parametrize(("model_type", "extra"), ARCHITECTURES)
def test_architectures(model_type: str, extra: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", model_type, **extra)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 50).tolist()
    engine = Engine(tmp_path / "m", threads=1, cache="f32", head="as stored")
    assert off(engine.forward(ids), wanted(tmp_path / "m", ids)) < 1e-5


def test_a_tied_table_under_the_name_of_the_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", tie_word_embeddings=True, stored="lm_head.weight")
    ids = list(range(30))
    engine = Engine(tmp_path / "m", threads=1, cache="f32", head="as stored")
    assert off(engine.forward(ids), wanted(tmp_path / "m", ids)) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mistral", {"sliding_window": 12}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_theta": 500000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ],
)  # fmt: skip
def test_settings_of_architectures(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", model_type, **settings)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 60).tolist()
    engine = Engine(tmp_path / "m", threads=1, cache="f32", head="as stored")
    expected = wanted(tmp_path / "m", ids)
    assert off(engine.forward(ids), expected) < 1e-5
    steps = [engine.forward(ids[:20])] + [engine.forward([t], 0, 20 + i) for i, t in enumerate(ids[20:])]
    assert off(np.concatenate(steps), expected) < 1e-5


@pytest.mark.parametrize(
    "recipe", ["w4a4-quarot", "w4a4-duquant", "w8a8-smoothquant", "sparse50-w4", "sparse70-w8a8", "2of4-permuted"]
)
def test_recipes(recipe: str, tmp_path: Path) -> None:
    """What compress writes: transforms, quantised attention, shared holders."""
    write_checkpoint(tmp_path / "dense", hidden_size=128, intermediate_size=384, head_dim=32)
    prose = tmp_path / "prose.txt"
    prose.write_text("The quick brown fox jumps over the lazy dog again and again. " * 80)
    tulle.compress(tmp_path / "dense", recipe, output=tmp_path / "out", calibration=[str(prose)], samples=8, length=64)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    expected = wanted(tmp_path / "out", ids)
    exact = Engine(tmp_path / "out", threads=2, cache="f32", head="as stored")
    # As above; benchmarks/agreement.py has the defaults on real models.
    assert off(exact.forward(ids), expected) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("head", "error"), [("int8", 2e-2), ("int4", 2e-1)])
def test_the_largest_logits_come_from_the_head_as_stored(
    dtype: torch.dtype, tied: bool, head: str, error: float, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "m", dtype=dtype, tie_word_embeddings=tied)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 20).tolist()
    exact, rough = (Engine(tmp_path / "m", 1, cache="f32", head=h).forward(ids) for h in ("as stored", head))
    largest = np.argsort(-exact, axis=1)[:, :32]
    near = np.take_along_axis(exact - rough, largest, 1)
    assert np.abs(near).max() < 1e-5 * np.abs(exact).max()
    # The others are rounded, though not far.
    assert error / 200 < off(rough, exact) < error


def test_caches(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 100).tolist()
    expected = wanted(tmp_path / "m", ids)
    found = {
        kind: off(Engine(tmp_path / "m", 1, cache=kind, head="as stored").forward(ids), expected)
        for kind in ("f32", "bf16", "int8")
    }
    assert found["f32"] < 1e-5 < found["bf16"] < 1e-2
    assert found["int8"] < 3e-2


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Whole numbers are the same, so the logits nearly are."""
    write_model(tmp_path / "m", SCHEMES["sparse w4a8"])
    found = logits_by_isa(tmp_path / "m", tmp_path, "engine.forward(list(range(30)))")
    for other in found[1:]:
        assert off(other, found[0]) < 1e-4


def test_threads_and_batches_change_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "m", SCHEMES["int4 sparse"])
    ids = np.random.default_rng(0).integers(0, 128, 30).tolist()
    one, three = (Engine(tmp_path / "m", threads=n, sequences=3) for n in (1, 3))
    assert np.array_equal(one.forward(ids), three.forward(ids))
    # Three sequences, interleaved in one pass, against each alone.
    others = [ids, ids[::-1], ids[5:] + ids[:5]]
    order = [(slot, i) for i in range(30) for slot in range(3)]
    tokens = [others[slot][i] for slot, i in order]
    mixed = three.forward(tokens, [s for s, _ in order], [i for _, i in order])
    for slot in range(3):
        alone = one.forward(others[slot])
        assert np.allclose(mixed[slot::3], alone, atol=1e-4 * np.abs(alone).max())
