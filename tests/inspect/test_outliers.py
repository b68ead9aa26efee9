"""Planted outliers are found where they were put; landscapes and sensitivity against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import PROSE, SIZES, write_checkpoint
from family_folders import write_family
from outliers import inject_outliers
from tiny_models import write_model
from tulle.core.grid import Grid, find_steps, round_to_grid
from tulle.core.token_grid import TokenGrid
from tulle.core.transform import fold, run
from tulle.errors import UserError
from tulle.evaluate.loading import load_model
from tulle.inspect.outliers import (
    GRID,
    MASSIVE,
    PICTURE,
    SHOWN_TOKENS,
    inspect_activations,
    landscape,
    outliers_of,
    pooled,
    rounding_error,
    smoothing_of,
    stages_of,
)
from tulle.inspect.sensitivity import measure_sensitivity, spearman
from tulle.methods.quantize.keep_sensitive import output_error
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import describe

CLEAN = 0.05
"""Spread of random weights small enough that no gate makes an outlier of its own."""


def sequences(count: int = 3, length: int = 60) -> list[torch.Tensor]:
    data = list(PROSE.encode())
    return [torch.tensor(data[300 * i : 300 * i + length]) for i in range(count)]


def test_kinds_by_hand() -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    clean = outliers_of(x)
    assert clean["normal"] == [] and clean["massive_values"] == 0 and clean["massive"] == []
    x[:, 7] *= 30
    x[123, 40] = -800.0
    x[200, 7] = 2000.0  # in a normal channel, but far beyond what it always is
    before = x.clone()
    found = outliers_of(x)
    assert torch.equal(x, before)
    assert [c["channel"] for c in found["normal"]] == [7]
    size, medians = x.abs(), x.abs().median(0).values
    assert found["normal"][0]["median"] == pytest.approx(float(medians[7]))
    assert found["normal"][0]["ratio"] == pytest.approx(float(medians[7] / medians.median())) == found["normal_ratio"]
    assert (found["massive_values"], found["massive_tokens"], found["massive_channels"]) == (2, 2, 2)
    assert [(m["token"], m["channel"], m["value"]) for m in found["massive"]] == [(200, 7, 2000.0), (123, 40, -800.0)]
    assert found["massive"][1]["ratio"] == pytest.approx(800 / float(size.median()))
    assert found["massive_ratio"] == found["massive"][0]["ratio"]
    assert found["rounding_error"] == pytest.approx(float((GRID.fake(x) - x).square().sum() / x.square().sum()))


def test_a_heavy_tail_is_no_outlier() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2000, 512, generator=generator).prod(0)  # every token reaches about 38 times the median
    assert float(x.abs().max() / x.abs().median()) > MASSIVE
    assert outliers_of(x)["massive_values"] == 0


def test_planted_normal_outliers_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", initializer_range=CLEAN)
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ["norm"], norm_channels=2, norm_factor=64.0)
    seen = []
    found = inspect_activations(tmp_path / "o", sequences(), progress=lambda *a: seen.append(a[0]))
    assert len(found["inputs"]) == 3 * 4 and found["tokens"] == 180
    assert seen[:3] == [f"activations {i}/3" for i in (1, 2, 3)] and seen[3].startswith("landscape 1/")
    clean = inspect_activations(tmp_path / "m", sequences())
    for entry, before in zip(found["inputs"], clean["inputs"], strict=True):
        assert before["normal"] == before["massive"] == []
        planted = facts["norm"]["channels"] if entry["role"] in ("qkv", "gate_up") else []
        assert sorted(c["channel"] for c in entry["normal"]) == planted
        assert entry["massive_values"] == 0
    assert found["inputs"][0]["readers"] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert all(shown["kinds"] == [] for shown in clean["landscapes"])
    assert found["landscapes"][0]["kinds"] == ["normal"] and found["landscapes"][0]["role"] in ("qkv", "gate_up")
    # One of each role: the largest outliers, and the most uneven input of the roles without.
    assert {shown["role"] for shown in found["landscapes"]} >= {"o", "down"}


@torch.no_grad()
def test_planted_massive_outliers_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", initializer_range=CLEAN)
    texts = [ids[:n] for ids, n in zip(sequences(), (40, 60, 50), strict=True)]  # the walk takes the longest first
    batch = torch.stack([ids[:40] for ids in texts])
    facts = inject_outliers(
        tmp_path / "m", tmp_path / "o", ["massive"], massive_blocks=[1], massive_ratio=2000.0, tokens=batch
    )
    (channel,) = facts["massive"][0]["channels"]
    found = inspect_activations(tmp_path / "o", texts, decode=lambda token: chr(token))
    for entry in found["inputs"]:
        here = entry["block"] == 1 and entry["role"] == "down"
        assert bool(entry["massive_values"]) == here
    entry = next(x for x in found["inputs"] if x["massive_values"])
    assert entry["readers"] == ["model.layers.1.mlp.down_proj"]
    model, _ = load_model(tmp_path / "o")
    inputs: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0][0]))
    for ids in texts:
        model(ids[None])
    assert {value["channel"] for value in entry["massive"]} == {channel}
    overall = float(torch.cat(inputs).abs().median())
    largest = sorted(((abs(float(v)), s, p) for s, x in enumerate(inputs) for p, v in enumerate(x[:, channel])))[::-1]
    for value, (size, sequence, position) in zip(entry["massive"], largest, strict=False):
        assert (value["sequence"], value["position"]) == (sequence, position)
        assert value["id"] == int(texts[sequence][position]) and value["text"] == chr(value["id"])
        assert value["ratio"] == pytest.approx(size / overall, rel=1e-3)
    # Where max/median of a channel is small, a factor that large lifts its median above the others' maxima, too.
    assert ["massive" in x["kinds"] for x in found["landscapes"] if x["role"] == "down"] == [True]


def test_a_compressed_model_and_an_unknown_device_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", {"all": {"bits": 4, "group_size": 32}})
    with pytest.raises(UserError, match="expected a dense checkpoint"):
        inspect_activations(tmp_path / "packed", sequences())
    write_checkpoint(tmp_path / "m")
    with pytest.raises(UserError, match="expected a device"):
        inspect_activations(tmp_path / "m", sequences(), device="nowhere")


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


def outlying(tokens: int = 100, channels: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X with a normal outlier, W, and SmoothQuant's s."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 40
    weight = torch.randn(32, channels, generator=torch.Generator().manual_seed(1))
    return x, weight, x.abs().amax(0) ** 0.6 / weight.abs().amax(0) ** 0.4


@pytest.mark.parametrize("family", ["qwen3_next", "mixtral"])
def test_experts_and_recurrent_mixers_are_inspected(family: str, tmp_path: Path) -> None:
    """Experts read what their router reads."""
    model = write_family(tmp_path / "m", family, 1)
    found = inspect_activations(model, sequences())
    roles = {(x["block"], x["role"]) for x in found["inputs"]}
    layers = Checkpoint.open(model).describe().layers
    assert roles == {(layer.index, group.role) for layer in layers for group in layer.groups}
    assert any(role == "router" for _, role in roles) and found["landscapes"]


def test_landscape_stages() -> None:
    x, weight, s = outlying()
    stages = landscape(x, [weight[:20], weight[20:]], s, block=16, steps=16)
    assert [stage["name"] for stage in stages] == [
        "original", "SmoothQuant, α 0.6", "Hadamard, blocks of 16", "DuQuant: smooth, R₁", "DuQuant: smooth, R₁·P",
        "DuQuant: smooth, R₁·P·R₂",
    ]  # fmt: skip
    peaks = [stage["peak"] for stage in stages]
    assert peaks[0] == pytest.approx(float(x.abs().max()))
    assert peaks[5] <= peaks[4] == peaks[3] <= peaks[1] < peaks[0]
    assert max(map(max, stages[0]["picture"])) == pytest.approx(peaks[0])
    wanted = x @ weight.T
    error = float((GRID.fake(x) @ GRID.fake(weight).T - wanted).square().sum() / wanted.square().sum())
    assert stages[0]["output_error"] == pytest.approx(error, rel=1e-4)
    assert stages[0]["rounding_error"] == rounding_error(x)
    assert stages[-1]["output_error"] < 0.5 * error


def test_stages_are_the_same_function_and_orthogonal_but_for_the_smoothing() -> None:
    x, weight, s = outlying()
    for name, maps in stages_of(x, s, block=16, steps=16):
        y = run(maps, x)
        # Float32: 64 terms, and up to four maps of them.
        torch.testing.assert_close(y @ fold(maps, weight).T, x @ weight.T, rtol=1e-4, atol=1e-3)
        smoothed = x / s if "mooth" in name else x
        assert float(y.norm()) == pytest.approx(float(smoothed.norm()), rel=1e-5)


def test_every_stage_shows_the_same_tokens() -> None:
    x, weight, s = outlying(tokens=2 * SHOWN_TOKENS)
    x[SHOWN_TOKENS + 7] *= 50
    x[10] *= 0.5
    for stage in landscape(x, [weight], s, block=16, steps=4):
        rows = torch.tensor(stage["picture"]).amax(1)
        # The loud token is in the middle, 4 tokens to a row.
        assert int(rows.argmax()) == SHOWN_TOKENS // 2 // (SHOWN_TOKENS // PICTURE[0])


def test_smoothing_is_that_of_the_recipe_step() -> None:
    sizes = describe(SIZES | {"model_type": "llama", "head_dim": 8}).layers[0].heads
    x, w = torch.rand(50, 32) + 0.1, torch.rand(8, 32) + 0.1
    s = smoothing_of(x, [w, 3 * w], "down", sizes)
    torch.testing.assert_close(s, x.amax(0) ** 0.6 / (3 * w.amax(0)) ** 0.4)
    heads = smoothing_of(x, [w], "o", sizes).reshape(2, 2, 8)
    assert torch.equal(heads[:, 0], heads[:, 1])  # one s for the query heads of a KV head


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


@torch.no_grad()
def test_the_output_error_is_that_of_mixed_precision(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    model, _ = load_model(tmp_path / "m")
    x: list[torch.Tensor] = []
    linear = model.model.layers[2].self_attn.o_proj
    handle = linear.register_forward_pre_hook(lambda m, a: x.append(a[0][0]))
    for ids in sequences(2):
        model(ids[None])
    handle.remove()
    found = measure_sensitivity(model, sequences(2), bits=8)
    entry = next(e for e in found["linears"] if e["name"] == "model.layers.2.self_attn.o_proj")
    expected = output_error(linear.weight, torch.cat(x), Grid(8, None, False), TokenGrid(8, symmetric=False))
    assert entry["output_error"] == pytest.approx(expected, rel=1e-5)
    assert (entry["role"], entry["block"], found["bits"], found["tokens"]) == ("o", 2, 8, 120)


def test_spearman() -> None:
    assert spearman([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert spearman([1, 1], [1, 2]) == spearman([], []) == 0
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert spearman([1], [1]) == 0
