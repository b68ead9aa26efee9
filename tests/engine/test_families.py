"""The engine against transformers, for every family: prompts, token by token, two sequences, packed models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tulle
from family_folders import write_family
from random_families import DENSE, EXPERTS, HYBRID
from tulle.compression.job import compress
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.text.reading import Text

TEXT = Text(("The quick brown fox jumps over the lazy dog. " * 20,), False, ("prose",))
TOKENS = list(b"A fox that is quick jumps over dogs.")
RUN = DENSE + HYBRID + EXPERTS
W4 = [{"gptq": {"bits": 4, "group_size": "auto-32"}}]


@torch.no_grad()
def wanted(folder: Path, tokens: list[int], packed: bool = False) -> np.ndarray:
    load = tulle.load if packed else AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32)(torch.tensor(tokens)[None]).logits[0].numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", RUN)
def test_dense(family: str, tmp_path: Path) -> None:
    """A prompt at once, and its tokens one after the other."""
    for seed in (1, 2):
        folder = write_family(tmp_path / str(seed), family, seed)
        expected = wanted(folder, TOKENS)
        engine = Engine(folder, threads=2, cache="f32", head="as stored")
        assert difference(engine.forward(TOKENS, wanted=range(len(TOKENS))), expected) <= 5e-5
        engine = Engine(folder, threads=2, cache="f32", head="as stored", context=48)
        rows = [engine.forward([token], 0, place) for place, token in enumerate(TOKENS)]
        assert difference(np.concatenate(rows), expected) <= 5e-5


@pytest.mark.parametrize("family", RUN)
def test_packed(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "dense", family, 3)
    compress(folder, {"calibration": {"samples": 4, "length": 24}, "steps": W4}, tmp_path / "out", calibration=TEXT)
    engine = Engine(tmp_path / "out", threads=2, cache="f32", head="as stored")
    found = engine.forward(TOKENS, wanted=range(len(TOKENS)))
    # The engine rounds what codes are multiplied with to 16 bits.
    assert difference(found, wanted(tmp_path / "out", TOKENS, packed=True)) <= 5e-3


def test_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the engine can run, found activation gelu; use transformers"):
        Engine(write_family(tmp_path / "model", "starcoder2", 1, hidden_act="gelu"), threads=1)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "gemma3_text", "gemma4_text"])
def test_an_embedding_in_codes(family: str, tmp_path: Path) -> None:
    """Rows are scaled as the dense model's are, in the engine and in transformers."""
    folder = write_family(tmp_path / "dense", family, 2)
    steps = [{"round_to_nearest": {"bits": 8, "targets": ["embedding"]}}]
    compress(folder, {"calibration": {"samples": 4, "length": 24}, "steps": steps}, tmp_path / "out", calibration=TEXT)
    found = Engine(tmp_path / "out", threads=2, cache="f32", head="as stored").forward(TOKENS)
    assert difference(found, wanted(tmp_path / "out", TOKENS, packed=True)) <= 1e-4
    assert difference(found, wanted(folder, TOKENS)) <= 0.2


def test_longrope_of_long_contexts(tmp_path: Path) -> None:
    """Beyond the first training's length all texts have the long factors, as transformers has them of long texts."""
    folder = write_family(tmp_path / "model", "phi3", 1)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"original_max_position_embeddings": 16}
    assert config["rope_scaling"]["type"] == "longrope"
    file.write_text(json.dumps(config))
    for context, tokens in ((64, TOKENS), (16, TOKENS[:16])):
        engine = Engine(folder, threads=1, context=context, cache="f32", head="as stored")
        assert difference(engine.forward(tokens), wanted(folder, tokens)) <= 5e-5


@pytest.mark.parametrize("cache", ["f32", "auto"])
def test_quantised_keys_of_heads_of_several_sizes(tmp_path: Path, cache: str) -> None:
    """Rotated head by head in front of the quantisers; the last layers read earlier ones' codes."""
    folder = write_family(tmp_path / "dense", "gemma4_text", 2)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_kv_shared_layers"] == 2
    recipe = {"calibration": {"samples": 4, "length": 24}, "steps": [{"kv_cache": {"bits": 4}}]}
    compress(folder, recipe, tmp_path / "out", calibration=TEXT)
    found = Engine(tmp_path / "out", threads=2, cache=cache, head="as stored").forward(TOKENS)
    expected = wanted(tmp_path / "out", TOKENS, packed=True)
    assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)
    dense = wanted(folder, TOKENS)
    assert np.linalg.norm(found - dense) > 2e-2 * np.linalg.norm(dense)
