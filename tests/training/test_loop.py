"""The loop on a toy model in eager fp32, where every statement about curves can be exact."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulle.errors import UserError
from tulle.text import standard_library
from tulle.training import checkpoint, loop
from tulle.training.corpus import prepare
from tulle.training.curve import read_metrics
from tulle.training.held_out import bits_per_byte
from tulle.training.launch import train
from tulle.training.optim import build_optimizers
from tulle.training.processes import Processes
from tulle.training.recipe import load_recipe

TEXT = ["def f(x):\n    return x\n" * 30, "class A:\n    pass\n" * 20]


@pytest.fixture(autouse=True, scope="module")
def small_evaluation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard_library, "held_out_text", lambda: TEXT)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_evaluation) -> Path:
    """An undisturbed run of the recipe as it stands."""
    folder = tmp_path_factory.mktemp("whole")
    return train(recipe_file(folder), folder / "out")


def recipe_file(folder: Path, **training) -> Path:
    content = {
        "seed": 5,
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        "data": {"sources": [{"name": "tqdm"}], "vocab_size": 300},
        "training": {
            "tokens": 12 * 64,
            "context": 16,
            "batch": 2,
            "accumulation": 2,
            "optimizer": "muon",
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "decay_fraction": 0.5,
            "precision": "fp32",
            "compile": False,
            "evaluate_every": 2,
            "evaluate_windows": 4,
            "checkpoint_every": 3,
        }
        | training,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


class Stopped(Exception):
    """Stands for a kill."""


def stop_at(monkeypatch, step: int) -> None:
    """Make the run die as optimizer step ``step`` begins."""
    original, calls = loop._step, iter(range(10_000))

    def dies(*arguments):
        if next(calls) == step:
            raise Stopped
        return original(*arguments)

    monkeypatch.setattr(loop, "_step", dies)


def curve(folder: Path) -> list[tuple]:
    return [(row["step"], row["held_out_bits_per_byte"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_resumed_run_equals_an_undisturbed_one(tmp_path, monkeypatch, whole):
    recipe = recipe_file(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped")
    resumed = train(recipe, tmp_path / "stopped", resume=True)
    assert curve(resumed) == curve(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ends = [load_file(checkpoint.latest(out / "checkpoints") / "model.safetensors") for out in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resume_before_the_first_checkpoint_starts_anew(tmp_path, monkeypatch, whole):
    recipe = recipe_file(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped")
    assert curve(train(recipe, tmp_path / "stopped", resume=True)) == curve(whole)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_checkpoint_holds_the_optimizer(tmp_path, kind):
    recipe = load_recipe(recipe_file(tmp_path, optimizer=kind))
    rows = torch.arange(4 * 17).reshape(4, 17)

    def fresh():
        torch.manual_seed(0)
        model = recipe.model.build(300, 16)
        return model, build_optimizers(model, recipe.training)

    def step(model, optimizers):
        settings, processes = recipe.training, Processes()
        loss = loop.Loss(model, settings, [], processes.device, print)
        return loop._step(0, model, optimizers, loss, rows, settings, [], processes)

    first = fresh()
    step(*first)
    checkpoint.save(tmp_path / "c", 1, recipe.model_dump(mode="json"), *first)
    second = fresh()
    checkpoint.load(checkpoint.latest(tmp_path / "c"), *second)
    assert [step(*first) for _ in range(3)] == [step(*second) for _ in range(3)]


def test_shortened_before_the_decay_is_the_shorter_run(tmp_path, monkeypatch):
    short = train(recipe_file(tmp_path / "a", tokens=8 * 64), tmp_path / "short")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            train(recipe_file(tmp_path / "b", tokens=40 * 64), tmp_path / "long")
    shortened = train(recipe_file(tmp_path / "b", tokens=8 * 64), tmp_path / "long", resume=True)
    assert curve(shortened) == curve(short)
    assert (shortened / "model.safetensors").read_bytes() == (short / "model.safetensors").read_bytes()


def test_length_is_fixed_once_the_decay_has_begun(tmp_path, whole):
    with pytest.raises(UserError, match="tokens to stay 768 once the decay has begun, found 1024 at step 12"):
        train(recipe_file(tmp_path, tokens=16 * 64), whole, resume=True)


def test_another_recipe_does_not_resume(tmp_path, whole):
    with pytest.raises(UserError, match="expected the recipe that .* was started with"):
        train(recipe_file(tmp_path, learning_rate=0.02), whole, resume=True)


def test_folder_in_use(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="to be empty, found files; try another folder, or --resume"):
        train(recipe_file(tmp_path), tmp_path / "out")


def test_too_little_held_out_text_is_said_before_training(tmp_path):
    file = recipe_file(tmp_path)
    content = yaml.safe_load(file.read_text())
    (tmp_path / "short.txt").write_text("x\n")
    content["data"]["held_out"] = [{"path": str(tmp_path / "short.txt")}]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="at least 17 held-out tokens, found 4; try more held_out text"):
        train(file, tmp_path / "out")
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_checkpoint_of_another_version_does_not_resume(tmp_path, whole):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    state = checkpoint.latest(out / "checkpoints") / "state.json"
    content = json.loads(state.read_text())
    content["facts"]["training"]["an_old_key"] = 1
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected the recipe that .* was started with"):
        train(recipe_file(tmp_path), out, resume=True)


def test_it_learns_and_ships_what_it_says(tmp_path):
    out = train(recipe_file(tmp_path, tokens=60 * 64), tmp_path / "out")
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5  # from ln 300 = 5.7 at the start
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 16
    assert AutoTokenizer.from_pretrained(out).eos_token_id == model.config.eos_token_id
    assert (out / "curve.png").stat().st_size > 1000
    # The estimate of the last row is of the fp32 weights and of evenly spaced windows of a periodic text;
    # bf16 rounding and the sample of windows stay within a few per cent.
    record = json.loads((out / "run.json").read_text())
    assert record["held_out_bits_per_byte"] == pytest.approx(rows[-1]["held_out_bits_per_byte"], rel=0.1)
    assert record["tokens_seen"] == 60 * 64


def test_accumulation_equals_one_large_batch(tmp_path, whole):
    one = train(recipe_file(tmp_path, batch=4, accumulation=1), tmp_path / "one")
    rows = [[row["loss"] for row in read_metrics(out / "metrics.jsonl")] for out in (one, whole)]
    # The same sums in another order of addition, amplified over 12 steps.
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-3)


def test_no_compiler_is_said_and_survived(tmp_path, monkeypatch):
    def broken(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    lines: list[str] = []
    train(recipe_file(tmp_path, compile=True), tmp_path / "out", log=lines.append)
    assert any("uncompiled and slower: no compiler at all" in line for line in lines)
    assert len(curve(tmp_path / "out")) == 6


def test_rows_count_tokens_and_seconds_since_the_row_before(tmp_path, monkeypatch):
    clock = itertools.count()  # a second passes with every look at it
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    rows = read_metrics(train(recipe_file(tmp_path, evaluate_every=5), tmp_path / "out") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 12] and [row["tokens"] for row in rows] == [320, 640, 768]
    assert [row["tokens_per_s"] for row in rows] == [320.0, 320.0, 128.0]


def test_diverged_run_stops_with_advice(tmp_path):
    with pytest.raises(UserError, match="finite training loss.*try a lower learning_rate"):
        train(recipe_file(tmp_path, optimizer="adamw", learning_rate=1e30), tmp_path / "out")


def test_bits_per_byte_of_a_model_that_knows_nothing(tmp_path):
    # All logits equal: every token costs log2(vocabulary) bits, whatever the windows.
    recipe = load_recipe(recipe_file(tmp_path))
    corpus = prepare(recipe.data, 0, tmp_path / "data", 300)
    model = recipe.model.build(300, 16)
    model.lm_head.weight.data.zero_()
    size = sum(len(text.encode()) for text in TEXT)
    expected = math.log2(300) * (len(corpus.held_out) - 1) / size
    assert bits_per_byte(model, corpus, 16) == pytest.approx(expected, rel=1e-6)


def test_a_line_of_metrics_that_a_kill_has_cut_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2}\n{"step": 4}\n{"ste')
    assert [row["step"] for row in read_metrics(file)] == [2, 4]
    loop.Metrics(file, 2, print, main=True).write({"step": 4, "loss": 1.0})
    assert [row["step"] for row in read_metrics(file)] == [2, 4]
