"""Reconstruction against the closed form where the part is linear in what is trained, and what must not move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import PROSE, write_checkpoint
from tulle.compression.job import compress
from tulle.compression.recipe import parse_recipe
from tulle.errors import UserError
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))
SPARSE = {"wanda": {"sparsity": 0.5}}
RECONSTRUCT = {"reconstruct": {"epochs": 3, "rate": 3e-3}}
GPTQ = {"gptq": {"bits": 4, "group_size": 16}}


def run(folder: Path, output: Path, *steps: dict[str, Any], target: str = "stream") -> dict[str, Any]:
    calibration = {"samples": 6, "length": 64, "target": target}
    return compress(folder, {"steps": list(steps), "calibration": calibration}, output, calibration=TEXT)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_down_alone_reaches_the_least_squares_fit(tmp_path: Path) -> None:
    """The stream after the block is linear in down's kept weights: training must end where the refit is."""
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    down = {"sparsity": 0.5, "targets": ["down"]}
    exact = run(tmp_path / "m", tmp_path / "a", {"wanda": down | {"refit": True, "damping": 1e-7}})
    plain = run(tmp_path / "m", tmp_path / "b", {"wanda": down})
    trained = run(
        tmp_path / "m", tmp_path / "c",
        {"wanda": down}, {"reconstruct": {"epochs": 400, "rate": 3e-2, "targets": ["down"]}},
    )  # fmt: skip
    best, start, found = (r["blocks"][0]["output_error"] for r in (exact, plain, trained))
    assert best < 0.8 * start
    assert (start - found) / (start - best) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("separate", [True, False])
def test_errors_fall_and_masks_stay(separate: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    settings = {"epochs": 3, "rate": 3e-3, "separate": separate}
    plain = run(tmp_path / "m", tmp_path / "a", SPARSE)
    tuned = run(tmp_path / "m", tmp_path / "b", SPARSE, {"reconstruct": settings})
    assert tuned["blocks"][0]["output_error"] < 0.9 * plain["blocks"][0]["output_error"]
    for block in tuned["blocks"]:
        assert len(block["notes"]) == (2 if separate else 1)
    assert [x["sparsity"] for x in plain["linears"]] == [x["sparsity"] for x in tuned["linears"]]
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    first = [name for name in before if "layers.0" in name and name.endswith("mask")]
    assert first and all(torch.equal(before[name], after[name]) for name in first)
    assert any(not torch.equal(before[n], after[n]) for n in before if "layers.0" in n)


def test_codes_stay_and_steps_move(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    plain = run(tmp_path / "m", tmp_path / "a", SPARSE, GPTQ)
    tuned = run(tmp_path / "m", tmp_path / "b", SPARSE, GPTQ, RECONSTRUCT)
    assert tuned["blocks"][0]["output_error"] < plain["blocks"][0]["output_error"]
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"scale"}


def test_quantisers_may_follow(tmp_path: Path) -> None:
    """Pruned, reconstructed, then rounded to what was found: the mask is the first step's."""
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    run(tmp_path / "m", tmp_path / "a", SPARSE, GPTQ)
    report = run(tmp_path / "m", tmp_path / "b", SPARSE, RECONSTRUCT, GPTQ)
    assert all(x["bits"] == 4 and x["sparsity"] == pytest.approx(0.5, abs=0.02) for x in report["linears"])
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    masks = [name for name in before if name.endswith("mask") and "q_proj" in name]
    assert masks and all(torch.equal(before[name], after[name]) for name in masks)


def test_gradients_pass_quantised_inputs(tmp_path: Path) -> None:
    """v is reached through o's rounded input alone."""
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    activations = {"activations": {"bits": 4}}
    only_qkv = {"reconstruct": {"epochs": 3, "rate": 3e-3, "targets": ["qkv"]}}
    plain = run(tmp_path / "m", tmp_path / "a", activations, SPARSE)
    tuned = run(tmp_path / "m", tmp_path / "b", activations, SPARSE, only_qkv)
    assert tuned["blocks"][0]["output_error"] < plain["blocks"][0]["output_error"]
    value = "model.layers.0.self_attn.v_proj"
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(value))


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    for name in ("a", "b"):
        run(tmp_path / "m", tmp_path / name, SPARSE, RECONSTRUCT)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bfloat16_blocks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    calibration = {"samples": 4, "length": 48, "compute": "bfloat16"}
    report = compress(
        tmp_path / "m", {"steps": [SPARSE, RECONSTRUCT], "calibration": calibration}, tmp_path / "o", calibration=TEXT
    )
    assert json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert "→" in report["blocks"][0]["notes"][0]


def test_bad_recipes() -> None:
    with pytest.raises(UserError, match="epochs of 1 or more"):
        parse_recipe({"steps": [SPARSE, {"reconstruct": {"epochs": 0}}]})
    with pytest.raises(UserError, match="compresses weights before reconstruct"):
        parse_recipe({"steps": [RECONSTRUCT, SPARSE]})
