"""The written model read again: its losses are transformers', and a broken one is not called done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tulle
from checkpoints import PROSE, write_checkpoint
from tulle.compression import reload as room
from tulle.compression.calibration import calibration_sequences
from tulle.compression.job import compress
from tulle.compression.recipe import read_recipe
from tulle.compression.reload import first_windows
from tulle.errors import UserError
from tulle.models.batches import batched
from tulle.models.checkpoint import Checkpoint, write_shard
from tulle.models.description import Rotary, describe
from tulle.text.reading import Text

pytestmark = pytest.mark.usefixtures("no_pages")

TEXT = Text((PROSE,), False, ("prose",))
EVERYWHERE = ["qkv", "o", "gate_up", "down", "embedding", "head"]
RECIPE: dict[str, Any] = {
    "steps": [{"gptq": {"bits": 4, "group_size": 16, "targets": EVERYWHERE}}],
    "calibration": {"samples": 3, "length": 40, "compute": "float32"},
}
ROUNDED: dict[str, Any] = {
    "steps": [
        {"smoothquant": {"alpha": 0.7}}, {"kv_cache": {"bits": 8}}, {"activations": {"bits": 8}},
        {"gptq": {"bits": 4, "group_size": 16}},
    ],
    "calibration": {"samples": 3, "length": 40, "compute": "float32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "untied", "qwen2", torch.bfloat16)
    write_checkpoint(folder / "tied", "llama", tie_word_embeddings=True)
    return {name: folder / name for name in ("untied", "tied")}


@pytest.mark.parametrize(("model", "recipe"), [("untied", RECIPE), ("tied", RECIPE), ("untied", ROUNDED)])
@torch.no_grad()
def test_losses_are_those_of_the_loaded_model(
    models: dict[str, Path], model: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Of the first sequences' beginnings, in transformers; the walk predicted them."""
    stages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "LENGTH", 25)
        report = compress(
            models[model], recipe, tmp_path / "out", calibration=TEXT, progress=lambda stage, *_: stages.append(stage)
        )
    found = report["reload"]
    assert (found["sequences"], found["tokens"]) == (3, 3 * 24)
    assert [stage for stage in stages if stage.startswith("read again")] == [f"read again {i}/3" for i in (1, 2, 3)]
    loaded = tulle.load(tmp_path / "out", dtype=torch.float32)
    description = Checkpoint.open(models[model]).describe()
    seen = torch.stack(calibration_sequences(description, models[model], TEXT, 3, 40))[:, :25]
    logits = loaded(seen).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, seen[:, 1:].flatten())
    assert found["loss"] == pytest.approx(float(wanted), abs=2e-4)
    assert abs(found["predicted_loss"] - found["loss"]) <= found["difference"] <= found["allowed"] / 4
    if recipe is RECIPE:  # nothing but the order of sums
        assert found["difference"] < 1e-5 and found["allowed"] == room.FLOOR
    else:
        assert found["difference"] > 0  # gains that the file holds in bfloat16
    assert found["allowed"] < 0.2


def scaled(suffix: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(suffix):
                tensors[name] = tensors[name] * factor

    return damage


DAMAGES = {
    "untied": ("layers.1.mlp.down_proj.scale", "layers.2.self_attn.v_proj.scale", "lm_head.scale", "model.norm.weight"),
    "tied": ("embed_tokens.scale",),
}


@pytest.mark.parametrize(("model", "suffix"), [(model, suffix) for model, all in DAMAGES.items() for suffix in all])
def test_a_broken_model_is_refused(models: dict[str, Path], model: str, suffix: str, tmp_path: Path) -> None:
    """The walk knows nothing of the damage, which the writer does; resuming does not pass it either."""
    damage = scaled(suffix, 3.0)

    def damaged(file: Path, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        damage(tensors)
        write_shard(file, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tulle.compression.run_folder.write_shard", damaged)
        for resume in (False, True):
            with pytest.raises(UserError, match="losses of its tokens .* nats from what it gave before") as error:
                compress(models[model], RECIPE, tmp_path / "out", calibration=TEXT, resume=resume)
            assert "\n" not in str(error.value)
            assert not (tmp_path / "out").exists()
            assert not list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("report.json"))


def test_a_model_that_cannot_be_read_is_refused_in_one_line(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tulle.cli import main

    def damaged(file: Path, tensors: dict[str, Tensor]) -> None:
        write_shard(file, {n: t * torch.nan if n.endswith("1.mlp.up_proj.scale") else t for n, t in tensors.items()})

    monkeypatch.setattr("tulle.compression.run_folder.write_shard", damaged)
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    (tmp_path / "prose.txt").write_text(PROSE)
    command = ["compress", str(models["untied"]), "-r", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]
    assert main.run([*command, "--calibration", str(tmp_path / "prose.txt")]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "expected" in x)
    assert "model.layers.1.mlp.up_proj: scale: expected finite numbers, found NaN or Inf" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("config.json"))


def test_one_rounding_is_of_what_steps_change() -> None:
    def rounding(*steps: dict[str, Any]) -> float:
        return room.rounding_of(read_recipe({"steps": list(steps)}), torch.float32)

    assert rounding({"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4}}) == 2.0**-24
    assert rounding({"smoothquant": {}}, {"gptq": {"bits": 4}}) == 2.0**-8
    assert rounding({"gptq": {"bits": 8, "input_bits": 8}}) == 2.0**-8
    assert rounding({"quarot": {"heads": False}}, {"gptq": {"bits": 4}}) == 2.0**-8


def test_windows_are_beginnings_of_the_first_sequences() -> None:
    """Whole sequences where a rotary table depends on the length, since a beginning has another table."""
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_attention_heads": 1}
    model = describe(config | {"intermediate_size": 8, "num_hidden_layers": 1})
    batches = batched([torch.arange(n) for n in (900, 800, 700, 5, 4)], 1400)
    assert [tuple(window.tokens.shape) for window in first_windows(model, batches)] == [(1, 512), (1, 512), (2, 512)]
    long = Rotary(8, 100.0, "dynamic", 16, factor=2.0)
    object.__setattr__(model, "rotary", {"default": long})
    windows = first_windows(model, batches)
    assert [tuple(window.tokens.shape) for window in windows] == [(1, 900), (1, 800), (2, 700)]
    assert windows[2].valid.sum(1).tolist() == [700, 5]
