"""Planted outliers are found where they were put; landscapes and sensitivity against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import PROSE, write_checkpoint
from tulle.activations import GRID, Input, inspect_activations, landscape, outliers_of, pooled
from tulle.core.grid import Grid, find_steps, round_to_grid
from tulle.evaluate.loading import load_model
from tulle.models.anatomy import LLAMA_ROWS
from tulle.models.outliers import inject_outliers
from tulle.sensitivity import measure_sensitivity, spearman


def sequences(count: int = 3, length: int = 60) -> list[torch.Tensor]:
    data = list(PROSE.encode())
    return [torch.tensor(data[300 * i : 300 * i + length]) for i in range(count)]


def test_kinds_by_hand() -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    clean = outliers_of(x)
    assert clean["normal"] == [] and clean["massive_values"] == 0 and clean["massive"] == []
    x[:, 7] *= 30
    x[123, 40] = -300.0
    found = outliers_of(x)
    assert found["normal"] == [7]
    assert found["massive_values"] == found["massive_tokens"] == 1
    assert found["massive"][0] | {"ratio": 0} == {"token": 123, "channel": 40, "value": -300.0, "ratio": 0}
    assert found["massive"][0]["ratio"] == pytest.approx(300 / float(x.abs().median()))
    assert found["rounding_error"] == pytest.approx(float((GRID.fake(x) - x).square().sum() / x.square().sum()))


def test_planted_outliers_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ["norm"], norm_channels=2, norm_factor=64.0)
    seen = []
    found = inspect_activations(tmp_path / "o", sequences(), progress=lambda *a: seen.append(a))
    assert len(found["inputs"]) == 3 * 4 and found["tokens"] == 180 and len(seen) == 3
    clean = inspect_activations(tmp_path / "m", sequences())
    for entry, before in zip(found["inputs"], clean["inputs"], strict=True):
        planted = facts["norm"]["channels"] if entry["role"] in ("qkv", "gate_up") else []
        # What o and down read is as it was; in down's input of a random model a gate may make a channel of its own.
        assert entry["normal"] == planted + before["normal"] and not (planted and before["normal"])
    assert found["inputs"][0]["readers"][0] == "model.layers.0.self_attn.q_proj"
    normal = next(x for x in found["landscapes"] if x["kind"] == "normal")
    assert normal["role"] in ("qkv", "gate_up")


def test_inputs_are_those_of_the_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m")
    seen: list[torch.Tensor] = []
    down = model.model.layers[2].mlp.down_proj
    down.register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
    with torch.no_grad():
        for ids in sequences():
            model(ids[None])
    x = torch.cat(seen)
    found = inspect_activations(tmp_path / "m", sequences())["inputs"][-1]
    assert found["role"] == "down"
    peaks = x.abs().amax(0)
    assert found["channel_ratio"] == pytest.approx(float(peaks.max() / peaks.median()), rel=1e-4)
    assert found["rounding_error"] == pytest.approx(
        float((GRID.fake(x) - x).square().sum() / x.square().sum()), rel=1e-3
    )


def test_landscape_stages(tmp_path: Path) -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 40
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    stages = landscape(Input(0, LLAMA_ROWS[0], x, [weight]), block=16, steps=16)
    assert [s["name"].split(":")[0] for s in stages] == [
        "original", "SmoothQuant", "Hadamard, 64 channels", "DuQuant", "DuQuant", "DuQuant",
    ]  # fmt: skip
    assert stages[0]["peak"] == pytest.approx(float(x.abs().max()))
    assert stages[-1]["peak"] <= stages[3]["peak"] <= stages[1]["peak"] < stages[0]["peak"]
    assert max(map(max, stages[0]["picture"])) == pytest.approx(stages[0]["peak"])
    wanted = x @ weight.T
    error = float((GRID.fake(x) @ GRID.fake(weight).T - wanted).square().sum() / wanted.square().sum())
    assert stages[0]["output_error"] == pytest.approx(error, rel=1e-4)
    assert stages[-1]["output_error"] < 0.5 * error


def test_pooling_keeps_the_peak() -> None:
    picture = torch.zeros(300, 500)
    picture[211, 307] = 9.0
    small = pooled(picture, 64, 96)
    assert small.shape == (64, 96) and small.max() == 9 and int((small > 0).sum()) <= 4
    assert pooled(picture[:10, :20], 64, 96).shape == (10, 20)


@torch.no_grad()
def test_sensitivity_by_hand(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    model, _ = load_model(tmp_path / "m")
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = measure_sensitivity(model, sequences(2), bits=4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert len(found["linears"]) == 21
    # One linear, again, with nothing of the module but the rounding itself.
    name = "model.layers.1.mlp.up_proj"
    entry = next(x for x in found["linears"] if x["name"] == name)
    linear, lost, total, losses, kls = model.get_submodule(name), 0.0, 0.0, [0.0, 0.0], 0.0
    dense = linear.weight.clone()
    step, zero = find_steps(dense, Grid(4, None, False))
    rounded = round_to_grid(dense, step, zero, Grid(4, None, False))
    for ids in sequences(2):
        wanted = model(ids[None]).logits[0]

        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            nonlocal lost, total
            x = arguments[0]
            lost += float((GRID.fake(x) @ rounded.T - x @ dense.T).square().sum())
            total += float((x @ dense.T).square().sum())
            return (GRID.fake(x),)

        handle = linear.register_forward_pre_hook(hook)
        linear.weight.copy_(rounded)
        got = model(ids[None]).logits[0]
        linear.weight.copy_(dense)
        handle.remove()
        for i, y in enumerate((wanted, got)):
            losses[i] += float(nn.functional.cross_entropy(y[:-1], ids[1:], reduction="sum"))
        p, q = wanted.log_softmax(-1), got.log_softmax(-1)
        kls += float((p.exp() * (p - q)).sum())
    assert entry["output_error"] == pytest.approx(lost / total, rel=1e-3)
    assert entry["loss_rise"] == pytest.approx((losses[1] - losses[0]) / 118, abs=1e-5)
    assert entry["kl"] == pytest.approx(kls / 120, rel=1e-2)
    assert found["loss"] == pytest.approx(losses[0] / 118, rel=1e-5)


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert spearman([1], [1]) == 0
