"""The step in a whole model: what it reports is what was retained, and values are moved, never changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tulle.compression.job import compress
from tulle.core.masks import Pattern
from tulle.core.permutation import retained
from tulle.core.transform import Permutation
from tulle.errors import UserError
from tulle.methods.contract import Survey
from tulle.methods.prune.permute_channels import PermuteChannels
from tulle.models.description import Linear, LinearGroup, Norm
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))
MAGNITUDE = {"score": "magnitude", "power": 1.0, "effort": 0.01}
LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip


def run(folder: Path, output: Path, *steps: dict[str, Any]) -> dict[str, Any]:
    recipe = {"steps": list(steps), "calibration": {"samples": 4, "length": 40}}
    return compress(folder, recipe, output, calibration=TEXT)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_values_are_moved_and_embeddings_stay_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", tie_word_embeddings=True, num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", {"permute_channels": MAGNITUDE})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    before, after = tensors(tmp_path / "m"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor.flatten().sort().values, after[name].flatten().sort().values), name
    # One order of the residual stream: found in the embedding, it is everywhere.
    embedding = "model.embed_tokens.weight"
    order = (after[embedding][:, :, None] == before[embedding][:, None, :]).all(0).int().argmax(1)
    assert sorted(order.tolist()) == list(range(len(order)))
    for name in (n for n in before if "layernorm" in n or n == "model.norm.weight"):
        assert torch.equal(after[name], before[name][order]), name


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_report_says_what_is_retained(score: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    settings = MAGNITUDE | {"score": score}
    report = run(tmp_path / "m", tmp_path / "out", {"permute_channels": settings}, {"magnitude": {"pattern": "2:4"}})
    before = tensors(tmp_path / "m")
    for block in report["blocks"]:
        found = {entry["role"]: entry for entry in block["permutations"]}
        assert list(found) == ["qkv", "o", "gate_up", "down"]
        for role, entry in found.items():
            assert entry["kept_before"] <= entry["kept_after"] <= entry["ideal"] <= 1, role
        assert {role: entry["folded"] for role, entry in found.items()} == {
            "qkv": "residual stream",
            "o": "v_proj",
            "gate_up": "residual stream",
            "down": "up_proj, gate_proj",
        }
        assert found["down"]["kept_after"] > found["down"]["kept_before"]
        if score == "magnitude":
            weights = before[f"model.layers.{block['index']}.mlp.down_proj.weight"].float().abs()
            share = retained(weights, Pattern(2, 4)) / float(weights.double().sum())
            assert found["down"]["kept_before"] == pytest.approx(share, rel=1e-5)
    # The mask keeps what the search promised: of sizes, where it was sizes that were searched.
    assert all(linear["pattern"] == "2:4" for linear in report["linears"])
    if score == "magnitude":
        pruned = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
        for block in report["blocks"]:
            for entry in block["permutations"]:
                names = [f"model.layers.{block['index']}.{name}" for name in LINEARS[entry["role"]]]
                kept = sum(float(pruned.get_submodule(n).dequantise().double().abs().sum()) for n in names)
                given = sum(float(before[f"{n}.weight"].double().abs().sum()) for n in names)
                assert kept / given == pytest.approx(entry["kept_after"], rel=1e-5), names


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_blocks_count_alike_for_the_residual_stream(score: Any) -> None:
    """Weights of one block a thousand times as large: the same order; without that block, another."""
    g = torch.Generator().manual_seed(0)
    weights = [{"q.weight": torch.randn(40, 32, generator=g)} for _ in range(2)]
    norms = [torch.rand(32, generator=g) + 0.1 for _ in range(2)]

    def order(factor: float, layers: int = 2) -> list[int]:
        survey = Survey(
            layers=layers, rows=lambda block, role: torch.eye(32),
            block=lambda i: {"q.weight": weights[i]["q.weight"] * (factor if i else 1)},
            groups=[{"qkv": LinearGroup("qkv", (Linear("q", (40, 32)),), Norm("norm", 1e-6))}] * layers,
            prefix=lambda i: f"{i}.", hidden=32,
            column_norm=lambda block, role: norms[block],
        )  # fmt: skip
        PermuteChannels(score=score, effort=0.05).plan(survey, ("qkv",))
        (found,) = survey.residual
        assert isinstance(found, Permutation)
        return found.index.tolist()

    assert order(1.0) == order(1024.0) == order(1 / 1024) != order(1.0, layers=1)


def test_groups_that_keep_their_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    settings = MAGNITUDE | {"residual": False}
    report = run(tmp_path / "m", tmp_path / "out", {"permute_channels": settings})
    found = {entry["role"]: entry for entry in report["blocks"][0]["permutations"]}
    assert found["qkv"]["folded"] == "" and "residual" in found["qkv"]["reason"]
    assert found["o"]["folded"] == "v_proj"
    before, after = tensors(tmp_path / "m"), tensors(tmp_path / "out")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_targets(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    report = run(tmp_path / "m", tmp_path / "out", {"permute_channels": MAGNITUDE | {"targets": ["down"]}})
    assert [entry["role"] for entry in report["blocks"][0]["permutations"]] == ["down"]


def test_a_stripe_wider_than_a_head_leaves_o_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", head_dim=8, num_hidden_layers=1)
    settings = MAGNITUDE | {"pattern": "8:16", "targets": ["o"]}
    report = run(tmp_path / "m", tmp_path / "out", {"permute_channels": settings})
    entry = report["blocks"][0]["permutations"][0]
    assert entry["folded"] == "" and "16" in entry["reason"]


def test_bad_settings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    for settings, message in [
        ({"pattern": "4:2"}, "1 <= N <= M"),
        ({"power": 0.0}, "power and effort above 0"),
        ({"effort": -1.0}, "power and effort above 0"),
        ({"pattern": "3:7"}, "divisible by 7"),
    ]:
        with pytest.raises(UserError, match=message):
            run(tmp_path / "m", tmp_path / "out", {"permute_channels": settings})
    with pytest.raises(UserError, match="leave one of the two out"):
        run(tmp_path / "m", tmp_path / "out", {"quarot": {}}, {"permute_channels": {}})
    assert not (tmp_path / "out").exists()
