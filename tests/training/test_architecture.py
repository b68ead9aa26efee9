"""New models of other architectures than Llama, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import tulle.hf  # noqa: F401 (registers the model)
from tulle.errors import UserError
from tulle.models.scaling_transformer import ScalingTransformerForCausalLM, parameter_count
from tulle.text import standard_library
from tulle.training import loop
from tulle.training.architecture import OtherModel
from tulle.training.curve import read_metrics
from tulle.training.launch import train
from tulle.training.optim import build_optimizers
from tulle.training.recipe import TrainRecipe, load_recipe

MODEL: dict[str, Any] = {
    "model_type": "scaling_transformer",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ff_block": 4,
    "ff_lowrank": 2,
    "qkv_modules": 4,
}


def recipe_file(folder: Path, **model: Any) -> Path:
    content = {
        "model": MODEL | model,
        "data": {"sources": [{"name": "tqdm"}], "vocab_size": 300},
        "training": {
            "tokens": 40 * 64, "context": 16, "batch": 4, "optimizer": "muon", "learning_rate": 0.01,
            "precision": "fp32", "compile": False, "evaluate_every": 10, "evaluate_windows": 4, "checkpoint_every": 20,
        },
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_scaling_transformer_is_trained_by_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns, is evaluated without noise, and is loaded by transformers."""
    monkeypatch.setattr(standard_library, "held_out_text", lambda: ["def f(x):\n    return x\n" * 30])
    training: list[bool] = []

    def estimate(loss_of: Any, *arguments: Any) -> float:
        training.append(loss_of._model.training)
        return original(loss_of, *arguments)

    original = loop.estimate
    monkeypatch.setattr(loop, "estimate", estimate)
    out = train(recipe_file(tmp_path), tmp_path / "out", log=lambda line: None)
    rows = read_metrics(out / "metrics.jsonl")
    assert training == [False] * 4
    assert len(rows) == 4 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, ScalingTransformerForCausalLM)
    assert (model.config.ff_block, model.config.vocab_size, model.config.max_position_embeddings) == (4, 300, 16)


def test_a_resumed_run_draws_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gumbel noise and the draws between hard and soft go on where the run was cut."""
    monkeypatch.setattr(standard_library, "held_out_text", lambda: ["def f(x):\n    return x\n" * 30])
    recipe = recipe_file(tmp_path)
    whole = train(recipe, tmp_path / "whole", log=lambda line: None)
    original = loop._step

    def dies(step: int, *arguments: Any) -> float:
        if step == 25:
            raise KeyboardInterrupt
        return original(step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_step", dies)
        train(recipe, tmp_path / "cut", log=lambda line: None)
    resumed = train(recipe, tmp_path / "cut", resume=True, log=lambda line: None)
    assert curve(resumed) == curve(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["held_out_bits_per_byte"]) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_optimizer(tmp_path: Path, kind: str) -> None:
    """Kernels of convolutions have four dimensions."""
    recipe = load_recipe(recipe_file(tmp_path))
    assert recipe.model is not None
    model = recipe.model.build(300, 16)
    assert model.dtype == torch.float32
    optimizers = build_optimizers(model, recipe.training.model_copy(update={"optimizer": kind}))
    listed = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"model_type": "scaling_transformr"},
            "a model_type that transformers knows.*did you mean 'scaling_transformer'",
        ),
        ({"ff_blok": 4}, "unknown key 'model.ff_blok'; did you mean 'ff_block'"),
        ({"vocab_size": 300}, "unknown key 'model.vocab_size'"),
        ({"ff_block": 5}, "intermediate_size to be a multiple of ff_block, found 32 and 5"),
        (
            {"loss_modules": 7, "tie_word_embeddings": False},
            "vocab_size to be a multiple of loss_modules, found 300 and 7",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_recipe(recipe_file(tmp_path, **model))
    assert "\n" not in str(error.value)


def test_the_scaling_recipes_differ_in_the_model_alone_and_match_in_parameters() -> None:
    """Within one block of units, or 1 %, of the dense recipe."""
    folder = Path(__file__).parents[2] / "recipes"
    recipes = {file.stem.removeprefix("scaling-"): load_recipe(file) for file in folder.glob("scaling-*.yaml")}
    assert set(recipes) == {"dense", "ff16", "ff32", "ff64", "qkv", "both"}
    dense = recipes.pop("dense")
    wanted = count(dense)
    for name, recipe in recipes.items():
        assert recipe.model_copy(update={"model": dense.model}) == dense, name
        assert count(recipe) == pytest.approx(wanted, rel=0.01), name


def count(recipe: TrainRecipe) -> int:
    assert isinstance(recipe.model, OtherModel) and recipe.data.vocab_size is not None
    return parameter_count(recipe.model.make_config(recipe.data.vocab_size, recipe.training.context))
