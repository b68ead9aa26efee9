"""A pipeline in one recipe: masks are held from stage to stage, a killed run ends where an undisturbed one does."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulle.errors import UserError
from tulle.hf import load
from tulle.models.description import describe
from tulle.training import loop, outcome
from tulle.training.curve import read_metrics
from tulle.training.launch import train
from tulle.training.plan import make_plan
from tulle.training.recipe import load_recipe

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
TRAINING = {
    "tokens": 4 * 64, "context": 16, "batch": 4, "learning_rate": 0.01, "schedule": "linear", "precision": "fp32",
    "compile": False, "evaluate_every": 2, "evaluate_windows": 4, "checkpoint_every": 3,
}  # fmt: skip


def pruning(share) -> dict:
    return {"steps": [{"sparsegpt": share}], "calibration": {"samples": 8, "length": 16}}


def pipeline() -> list[dict]:
    held = {"held_masks": {}}
    return [
        {"name": "dense"},
        {"name": "half", "prune": pruning({"sparsity": 0.5}), "methods": [held]},
        {
            "name": "most",
            "prune": pruning({"sparsity": 0.7}),
            "methods": [held, {"squarehead": {"teacher": "dense", "kl": 0.5}}],
            "compress": {
                "steps": [{"smoothquant": {}}, {"activations": {"bits": 8}}, {"gptq": {"bits": 8}}],
                "calibration": {"samples": 8, "length": 16},
            },
        },
    ]


def write(folder: Path, **content) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, first in (("train", 0), ("test", 900)):
        rows = [{"text": f"Row {i} of {name} holds the square {i * i} of {i}.\n" * 3} for i in range(first, first + 60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "sources": [{"path": str(folder / "train.jsonl")}],
        "held_out": [{"path": str(folder / "test.jsonl"), "documents": 10}],
    }
    recipe = {"seed": 3, "data": data | {"vocab_size": 300}, "training": TRAINING, "model": SHAPE} | content
    if "start" in content:
        del recipe["model"], recipe["data"]["vocab_size"]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Pages and curves are most of the time of a tiny run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tulle.compression.job.write_report", lambda report, file: file.write_text("page"))
        patch.setattr(outcome, "draw_curve", lambda rows, file, *_: file.write_text(f"{len(rows)} rows"))
        yield


@pytest.fixture(scope="module")
def walked(tmp_path_factory, no_pictures) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    return train(write(folder, stages=pipeline()), folder / "out", log=lambda line: None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.float() for k, v in load_file(folder / "model.safetensors").items() if "_proj" in k}


def share(tensors: dict[str, torch.Tensor]) -> float:
    return sum(int((t == 0).sum()) for t in tensors.values()) / sum(t.numel() for t in tensors.values())


def test_masks_are_held_and_tightened_from_stage_to_stage(walked):
    dense, half, most = (weights(f) for f in sorted((walked / "stages").iterdir()))
    assert share(dense) == 0
    # Counts of pruned weights are exact per matrix, rounded to whole entries.
    assert share(half) == pytest.approx(0.5, abs=0.002) and share(most) == pytest.approx(0.7, abs=0.002)
    pruned = weights(walked / "stages/02-half/pruned")
    for name, tensor in half.items():
        assert torch.equal(tensor == 0, pruned[name] == 0)
        assert not torch.equal(tensor, pruned[name])  # and trained
        assert (most[name][tensor == 0] == 0).all()  # what is pruned stays pruned at the next stage
    final = weights(walked)
    assert all(torch.equal(final[name] == 0, tensor == 0) for name, tensor in most.items())


def test_the_packed_model_has_the_same_zeros(walked):
    packed = load(walked / "stages/03-most/packed", dtype=torch.float32)
    trained = weights(walked / "stages/03-most")
    shape = describe(packed.config.to_dict())
    for layer in shape.layers:
        for name in shape.linear_names(layer.index):
            # A kept weight may round to zero; a pruned one never comes back.
            kept = packed.get_submodule(name).dequantise() != 0
            assert not (kept & (trained[f"{name}.weight"] == 0)).any()
            assert int(kept.sum()) > 0.25 * kept.numel()


def test_what_a_run_leaves(walked):
    model = AutoModelForCausalLM.from_pretrained(walked)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(walked).eos_token_id == 0
    record = json.loads((walked / "run.json").read_text())
    assert [s["stage"] for s in record["stages"]] == ["dense", "half", "most"]
    assert record["sparsity"] == pytest.approx(0.7, abs=0.002) and record["tokens_seen"] == 3 * 256
    rows = read_metrics(walked / "metrics.jsonl")
    assert [row["tokens"] for row in rows] == [128, 256, 256, 384, 512, 512, 640, 768]
    assert {"squarehead", "kl", "sparsity"} <= set(rows[-1])
    assert (walked / "curve.png").read_text() == "8 rows"
    assert (walked / "stages/02-half/pruned/report.json").is_file()


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", [1, 11], ids=["in the first stage", "near the end"])
def test_a_killed_pipeline_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch, walked, moment):
    recipe = write(tmp_path, stages=pipeline())
    original, calls = loop._step, iter(range(1000))

    def dies(*arguments):
        if next(calls) == moment:
            raise Stopped
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", dies)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "out", log=lambda line: None)
    out = train(recipe, tmp_path / "out", resume=True, log=lambda line: None)
    assert (out / "model.safetensors").read_bytes() == (walked / "model.safetensors").read_bytes()
    timed = ("tokens_per_s",)
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in read_metrics(f / "metrics.jsonl")]
            for f in (out, walked)]  # fmt: skip
    # The mean loss and a method's figures since the last row are of the steps since the resume.
    keys = ("step", "tokens", "held_out_bits_per_byte", "learning_rate", "sparsity")
    assert [[row.get(k) for k in keys] for row in rows[0]] == [[row.get(k) for k in keys] for row in rows[1]]


def test_another_pipeline_does_not_resume(tmp_path, walked):
    with pytest.raises(UserError, match="expected the recipe that .* was started with"):
        train(write(tmp_path, stages=pipeline()[:2]), walked, resume=True)


def test_training_goes_on_from_a_packed_model(tmp_path, walked):
    stage = {"name": "on", "methods": [{"held_masks": {}}]}
    recipe = write(tmp_path, start=str(walked / "stages/03-most/packed"), stages=[stage])
    out = train(recipe, tmp_path / "out", log=lambda line: None)
    packed = weights(walked / "stages/03-most")
    for name, tensor in weights(out / "stages/01-on").items():
        assert (tensor[packed[name] == 0] == 0).all()
    first = read_metrics(out / "metrics.jsonl")[0]
    assert first["step"] == 0 and "loss" not in first


@pytest.mark.parametrize(
    "method",
    [
        {"ste": {}}, {"sr_ste": {"decay": 1e-3}}, {"s_ste": {"pattern": "1:4"}}, {"step": {}},
        {"top_kast": {"refresh": 2}}, {"gradual_magnitude": {"every": 1}},
    ],
    ids=lambda method: next(iter(method)),
)  # fmt: skip
def test_every_method_trains_from_scratch_and_resumes_to_the_same_bytes(tmp_path, monkeypatch, method):
    recipe = write(tmp_path, methods=[method])
    whole = train(recipe, tmp_path / "whole", log=lambda line: None)
    original, calls = loop._step, iter(range(1000))

    def dies(*arguments):
        if next(calls) == 3:
            raise Stopped
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", dies)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped", log=lambda line: None)
    resumed = train(recipe, tmp_path / "stopped", resume=True, log=lambda line: None)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    expected = {"s_ste": 0.75, "top_kast": 0.8}.get(next(iter(method)), 0.5)
    assert share(weights(whole)) == pytest.approx(expected, abs=0.002)


ROTATED = {"name": "a", "prune": {"steps": [{"larosa": {}}]}}


def taught(by: str) -> list[dict]:
    return [{"squarehead": {"teacher": by}}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [{"name": "a", "prune": {"steps": [{"gptq": {"bits": 4}}]}}],
            "expected pruning steps or larosa in prune, found gptq",
        ),
        ([{"name": "a", "methods": [{"held_mask": {}}]}], "expected a training method of held_masks"),
        ([{"name": "a", "methods": [{"sr_ste": {"lambda": 1}}]}], "unknown key 'methods.sr_ste.lambda'"),
        (
            [{"name": "a", "methods": [{"sr_ste": {}}, {"bitnet": {"targets": ["o"]}}]}],
            "one method in stage a that puts other weights into the forward pass of o, found sr_ste and bitnet",
        ),
        (
            [{"name": "a", "methods": [{"gradual_magnitude": {}}, {"top_kast": {"targets": ["down"]}}]}],
            "that chooses or holds the mask of down, found gradual_magnitude and top_kast; leave one of them out",
        ),
        ([{"name": "a", "methods": [{"q_sparse": {}}, {"q_sparse": {}}]}], "selects inputs of qkv, found q_sparse and"),
        ([{"name": "a", "methods": [{"held_masks": {}}]}], "expected a model with pruned weights to hold"),
        ([{"name": "a", "training": {"learnin_rate": 1}}], "stage a: unknown key 'learnin_rate'; did you mean"),
        (
            [ROTATED | {"methods": taught("start")}],
            "a teacher for stage a with its residual stream",
        ),
        (
            [{"name": "0"}, ROTATED, {"name": "b", "methods": taught("0")}],
            "a teacher for stage b",
        ),
        ([{"name": "a", "methods": taught("")}], "a teacher for stage a, found none; name a folder"),
        ([{"name": "a"}, {"name": "a"}], "each stage needs a name of its own"),
        ([{"name": "a", "training": {"tokens": 0}}], "tokens of stage a to cover one step"),
    ],
)
def test_bad_pipelines_fail_in_one_line(tmp_path, given, message):
    with pytest.raises(UserError, match=message) as error:
        train(write(tmp_path, stages=given), tmp_path / "out", log=lambda line: None)
    assert "\n" not in str(error.value)


def test_a_stage_may_branch_off_an_earlier_one(tmp_path):
    cut = {"steps": [{"magnitude": {"sparsity": 0.5}}]}
    way = [{"name": "a"}, {"name": "b"}, {"name": "c", "start": "a", "prune": cut, "training": {"tokens": 0}}]
    out = train(write(tmp_path, stages=way), tmp_path / "out", log=lambda line: None)
    a, b, c = (weights(folder) for folder in sorted((out / "stages").iterdir()))
    for name, tensor in c.items():
        assert torch.equal(tensor, a[name] * (tensor != 0)) and not torch.equal(a[name], b[name])


def test_an_unknown_start_fails_in_one_line(tmp_path):
    with pytest.raises(UserError, match="expected a model folder.*found 'nowhere'"):
        train(write(tmp_path, stages=[{"name": "a", "start": "nowhere"}]), tmp_path / "out", log=lambda line: None)


def test_a_pipeline_that_failed_at_once_may_be_mended_and_started_again(tmp_path):
    wrong = {"name": "a", "prune": {"steps": [{"sparsegpt": {"sparsity": 0.5}}], "calibration": {"samples": 10**6}}}
    with pytest.raises(UserError, match="calibration text"):
        train(write(tmp_path, stages=[wrong]), tmp_path / "out", log=lambda line: None)
    right = {"name": "a", "prune": pruning({"sparsity": 0.5}), "methods": [{"held_masks": {}}]}
    out = train(write(tmp_path, stages=[right]), tmp_path / "out", log=lambda line: None)
    assert share(weights(out)) == pytest.approx(0.5, abs=0.002)


def test_teachers_and_students_of_one_basis(tmp_path):
    """What the check of bases lets through, and that it knows where a residual stream was rotated."""
    branch = {"name": "b", "start": "elsewhere", "methods": taught("start")}
    permuted = ROTATED | {"prune": {"steps": [{"permute_channels": {}}]}, "training": {"tokens": 0}}
    again = {"name": "b", "methods": taught("a")}
    for way in ([{"name": "a"}, branch], [ROTATED | {"training": {"tokens": 0}}, again], [permuted, again]):
        make_plan(load_recipe(write(tmp_path, stages=way)))
    with pytest.raises(UserError, match="'elsewhere', not rotated or permuted as in stage a"):
        make_plan(load_recipe(write(tmp_path, stages=[permuted, again | {"methods": taught("elsewhere")}])))


def test_a_first_stage_of_a_new_model_may_have_a_corpus_of_its_own(tmp_path):
    write(tmp_path / "other")
    own = {
        "sources": [{"path": str(tmp_path / "other/train.jsonl")}],
        "held_out": [{"path": str(tmp_path / "other/test.jsonl")}],
    }
    out = train(write(tmp_path, stages=[{"name": "a", "data": own}]), tmp_path / "out", log=lambda line: None)
    record = json.loads((out / "stages/01-a/run.json").read_text())
    size = sum(
        len(json.loads(row)["text"].encode()) for row in (tmp_path / "other/test.jsonl").read_text().splitlines()
    )
    assert record["held_out_bytes"] == size
