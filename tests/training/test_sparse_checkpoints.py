"""A checkpoint that was trained sparse goes into ``compress`` as it is: every method keeps its zeros."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import PROSE, write_checkpoint
from tulle.compression.block_work import DENSIFIED
from tulle.compression.job import compress
from tulle.compression.recipe import METHODS
from tulle.hf import load
from tulle.text.reading import Text

STEPS: dict[str, list[dict]] = {
    "gptq": [{"gptq": {"bits": 4, "group_size": 16}}],
    "gptq, asymmetric": [{"gptq": {"bits": 4, "symmetric": False}}],
    "round_to_nearest": [{"round_to_nearest": {"bits": 4, "symmetric": False}}],
    "smoothquant": [{"smoothquant": {}}, {"activations": {"bits": 8}}, {"gptq": {"bits": 8}}],
    "learned_clipping": [{"learned_clipping": {"epochs": 1}}, {"round_to_nearest": {"bits": 4}}],
    "keep_sensitive": [{"keep_sensitive": {"count": 1}}, {"gptq": {"bits": 4}}],
    "kv_cache": [{"kv_cache": {"bits": 8}}, {"gptq": {"bits": 8}}],
    "reconstruct": [{"gptq": {"bits": 4}}, {"reconstruct": {"epochs": 1}}],
    "magnitude": [{"magnitude": {"sparsity": 0.75}}],
    "wanda": [{"wanda": {"sparsity": 0.75}}],
    "ria": [{"ria": {"sparsity": 0.75}}],
    "sparsegpt": [{"sparsegpt": {"sparsity": 0.75}}, {"gptq": {"bits": 4}}],
    "alps": [{"alps": {"sparsity": 0.75}}],
    "owl": [{"owl": {"sparsity": 0.75}}, {"sparsegpt": {"sparsity": 0.75}}],
    "allocate": [{"allocate": {"sparsity": 0.75}}, {"sparsegpt": {"sparsity": 0.75}}],
    "allocate_bits": [{"allocate_bits": {"bits": 5.0, "group_sizes": ["auto-32"]}}, {"gptq": {}}],
    "permute_channels": [{"permute_channels": {"pattern": "2:4"}}, {"gptq": {"bits": 4}}],
}
FILLING = {
    "quarot": [{"quarot": {}}, {"gptq": {"bits": 4}}],
    "duquant": [{"duquant": {}}, {"gptq": {"bits": 4}}],
    "perq": [{"perq": {}}, {"gptq": {"bits": 4}}],
    "flatquant": [{"flatquant": {"epochs": 1}}, {"gptq": {"bits": 4}}],
    "affinequant": [{"affinequant": {"epochs": 1}}, {"gptq": {"bits": 4}}],
    "spinquant": [{"spinquant": {"steps": 1}}, {"gptq": {"bits": 4}}],
}
"""Rotations and affine maps fill zeros, which cannot be helped; the report must say so."""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pruned"
    write_checkpoint(folder, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            tensor *= torch.rand(tensor.shape, generator=generator) > 0.6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("tulle.compression.job.write_report", lambda report, file: file.write_text("page"))


def compressed(pruned: Path, out: Path, steps: list[dict]) -> dict:
    recipe = {"steps": steps, "calibration": {"samples": 4, "length": 32}}
    return compress(pruned, recipe, out, calibration=Text((PROSE,), False))


@pytest.mark.parametrize("name", STEPS)
def test_zeros_stay(tmp_path, pruned, name):
    report = compressed(pruned, tmp_path / "out", STEPS[name])
    model = load(tmp_path / "out", dtype=torch.float32)
    dense = load_file(pruned / "model.safetensors")
    for linear in report["linears"]:
        weight = model.get_submodule(linear["name"])
        found = weight.dequantise() if hasattr(weight, "dequantise") else weight.weight
        before = dense[f"{linear['name']}.weight"] == 0
        if name == "permute_channels":
            assert int((found == 0).sum()) >= int(before.sum())  # in another order
        else:
            assert (found[before] == 0).all(), linear["name"]
        assert linear["sparsity"] >= float(before.float().mean()) - 1e-9
    if "0.75" in str(STEPS[name]):
        assert report["totals"]["sparsity"] == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("name", FILLING)
def test_transforms_that_fill_zeros_say_so(tmp_path, pruned, name):
    def notes(model: Path, out: Path) -> list[str]:
        report = compressed(model, out, FILLING[name])
        return [note for linear in report["linears"] for note in linear["notes"]] + report["notes"]

    assert DENSIFIED in notes(pruned, tmp_path / "out")
    write_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    assert DENSIFIED not in notes(tmp_path / "dense", tmp_path / "of dense")


def test_every_method_is_tried():
    tried = {step for steps in [*STEPS.values(), *FILLING.values()] for entry in steps for step in entry}
    rooms = ("tulle.methods.prune", "tulle.methods.quantize")
    of_weights = {name for name, path in METHODS.items() if path.startswith(rooms)}
    assert of_weights <= tried


def test_a_pattern_is_found(tmp_path):
    folder = tmp_path / "model"
    write_checkpoint(folder, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            tensor[:, 0::4] = tensor[:, 3::4] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = compressed(folder, tmp_path / "out", [{"gptq": {"bits": 8}}])
    assert {linear["pattern"] for linear in report["linears"]} == {"2:4"}


def test_a_dense_checkpoint_gets_no_mask(tmp_path):
    write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    report = compressed(tmp_path / "model", tmp_path / "out", [{"round_to_nearest": {"bits": 8}}])
    assert {linear["sparsity"] for linear in report["linears"]} == {0.0}
