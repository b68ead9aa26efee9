"""TEAL, WINA and the budget: quantiles and scores by brute force; one model from the recipe to the loaded folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tulle.compression.job import compress
from tulle.compression.recipe import parse_recipe
from tulle.core.allocation import divide
from tulle.core.sample import Reservoir
from tulle.core.topk import Selection
from tulle.errors import UserError
from tulle.hf.packed_linear import PackedLinear
from tulle.methods.activation.thresholds import TEAL, threshold_for
from tulle.methods.activation.wina import column_scores
from tulle.models.description import describe
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))


def run(folder: Path, output: Path, steps: list[dict[str, Any]], target: str = "layer") -> Any:
    recipe = {"steps": steps, "calibration": {"samples": 6, "length": 40, "target": target}}
    return compress(folder, recipe, output, calibration=TEXT)


def prose() -> torch.Tensor:
    data = list(PROSE.encode())
    return torch.tensor([data[:50], data[300:350]])


def specs(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["linears"]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 0.9])
def test_threshold_drops_the_share(share: float) -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    dropped = (x.abs() <= threshold_for(x, share)).sum()
    assert dropped == round(share * 2000)


def test_wina_scores_are_what_a_dropped_input_costs() -> None:
    """Of all masks with K inputs, the best scores leave the least expected error where columns are orthogonal."""
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(7, 6, generator=generator))[0]
    weight = orthogonal * torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0, 1.5])
    x = torch.randn(6, generator=generator)
    mask = Selection(keep=3, score=column_scores([weight])).mask(x[None])[0]
    lost = {
        kept: float((weight @ x - weight[:, list(kept)] @ x[list(kept)]).square().sum())
        for kept in itertools.combinations(range(6), 3)
    }
    assert mask.nonzero()[:, 0].tolist() == list(min(lost, key=lost.__getitem__))


def test_siblings_scores_are_those_of_their_stacked_rows() -> None:
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.allclose(column_scores([a, b]), torch.cat([a, b]).norm(dim=0))


def test_reservoir_is_uniform_and_does_not_see_batches() -> None:
    x = torch.arange(1000.0)[:, None]
    whole, parts = Reservoir(100, seed=1), Reservoir(100, seed=1)
    whole.add(x)
    for part in x.split(37):
        parts.add(part)
    assert torch.equal(whole.rows, parts.rows) and len(whole.rows.unique()) == 100
    plain, zero = Reservoir(100), Reservoir(100, seed=0)
    plain.add(x)
    zero.add(x)
    assert torch.equal(plain.rows, zero.rows) and not torch.equal(plain.rows, whole.rows)
    # The mean of 100 of 1000 uniform numbers has a standard deviation of 27.
    means = []
    for seed in range(20):
        reservoir = Reservoir(100, seed)
        reservoir.add(x)
        means.append(float(reservoir.rows.mean()))
    assert abs(np.mean(means) - 499.5) < 25 and np.std(means) > 10


def test_divide_against_brute_force() -> None:
    levels = np.array([0.0, 0.25, 0.5, 0.75])
    costs = np.array([[0, 1, 4, 9.0], [0, 3, 7, 12.0], [0, 0.5, 2, 9.0]])
    weights = np.array([1.0, 2.0, 1.0])
    found = divide(levels, costs, weights, 0.4375, step=0.25)
    best = min(
        sum(costs[u, k] for u, k in enumerate(choice))
        for choice in itertools.product(range(4), repeat=3)
        if abs(sum(weights[u] * levels[k] for u, k in enumerate(choice)) - 0.4375 * 4) < 1e-9
    )
    assert np.isclose((weights * found).sum(), 0.4375 * 4)
    # Linear between the levels, convex curves: as good as the best choice of levels, or better.
    assert sum(np.interp(s, levels, c) for s, c in zip(found, costs, strict=True)) <= best + 1e-9


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_loaded_model_drops_what_was_asked_for(model_type: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", model_type, num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", [{"wina": {"share": 0.5}}])
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 14
    for name, module in packed.items():
        module.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: m.selected(a[0])}))
    model(prose())
    for name, x in seen.items():
        assert ((x == 0).sum(-1) == x.shape[-1] // 2).all(), name
    groups = describe(model.config.to_dict()).layers[0].groups
    for group in groups:
        inputs = [seen[f"model.layers.1.{n}"] for n in group.names]
        assert all(torch.equal(inputs[0], x) for x in inputs)


@torch.no_grad()
def test_thresholds_meet_the_share_on_the_calibration_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", [{"teal": {"share": 0.6}}])
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    # Of the second block: embeddings of bytes repeat themselves, and equal numbers fall together.
    module = model.get_submodule("model.layers.1.self_attn.q_proj")
    module.register_forward_pre_hook(lambda m, a: seen.append(m.selected(a[0])))
    from transformers import AutoTokenizer

    from tulle.text.reading import sequences

    for tokens in sequences(TEXT, AutoTokenizer.from_pretrained(tmp_path / "m"), 40, 6, 0):
        model(tokens[None])
    share = float(torch.cat([x.flatten() for x in seen]).eq(0).float().mean())
    # The sample is the whole text (240 tokens); rounding to whole ranks and ties are all that is left.
    assert share == pytest.approx(0.6, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("target", ["layer", "stream"])
@pytest.mark.parametrize(
    "steps",
    [
        [{"teal": {"share": 0.4}}, {"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 6, "input_bits": 8}}],
        [{"activations": {"bits": 6}}, {"wina": {"share": 0.4, "rescale": True}}, {"gptq": {"bits": 6}}],
        [{"teal": {"share": 0.5, "kind": "top_k", "block": 16}}, {"round_to_nearest": {"bits": 8, "input_bits": 8}}],
    ],
    ids=["teal+sparse+w6a8", "a6+wina+w6", "blocks+w8a8"],
)
def test_the_walker_sees_what_the_artefact_computes(steps: Any, target: str, tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    report = run(tmp_path / "m", tmp_path / "out", steps, target)
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    from transformers import AutoTokenizer

    from tulle.text.reading import sequences

    lost = total = 0.0
    for tokens in sequences(TEXT, AutoTokenizer.from_pretrained(tmp_path / "m"), 40, 6, 0):
        found, wanted = (_last_hidden(m, tokens[None]) for m in (model, dense))
        lost += float((found - wanted).square().sum())
        total += float(wanted.square().sum())
    # A number on an edge of the grid or of the selection may fall to the other side.
    assert lost / total == pytest.approx(report["blocks"][-1]["output_error"], rel=2e-2)
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(tulle.hf.load(again, dtype=torch.float32)(prose()).logits, model(prose()).logits)


def _last_hidden(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0]))
    model(tokens)
    handle.remove()
    return found[0]


def test_budget_is_met_and_follows_what_is_measured(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    steps = [{"activation_budget": {"share": 0.5, "tokens": 60}}, {"teal": {"kind": "top_k"}}]
    run(tmp_path / "m", tmp_path / "out", steps)
    found = specs(tmp_path / "out")
    kept = {name: s["input_sparsity"]["keep"] / s["shape"][1] for name, s in found.items()}
    sizes = {name: s["shape"][0] * s["shape"][1] for name, s in found.items()}
    active = sum(sizes[n] * kept[n] for n in found) / sum(sizes.values())
    # Whole channels: half a channel of 32 or 64 at the most.
    assert active == pytest.approx(0.5, abs=0.5 / 32)
    assert len({round(k, 3) for k in kept.values()}) > 2
    for index in range(2):
        prefix = f"model.layers.{index}."
        assert kept[prefix + "mlp.gate_proj"] == kept[prefix + "mlp.up_proj"]


def test_budget_finds_the_role_that_does_not_matter(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    state = dense.state_dict()
    with torch.no_grad():
        state["model.layers.0.mlp.down_proj.weight"].mul_(1e-3)
    folder = tmp_path / "damped"
    dense.save_pretrained(folder)
    from tulle.models.checkpoint import companions

    for file in companions(tmp_path / "m"):
        (folder / file.name).write_bytes(file.read_bytes())
    steps = [{"activation_budget": {"share": 0.4, "tokens": 60}}, {"teal": {"kind": "top_k"}}]
    run(folder, tmp_path / "out", steps)
    kept = {name: s["input_sparsity"]["keep"] / s["shape"][1] for name, s in specs(tmp_path / "out").items()}
    prefix = "model.layers.0."
    # Feed-forward outputs count a thousandth, and its inputs suffice for the budget.
    assert max(kept[prefix + "mlp.down_proj"], kept[prefix + "mlp.gate_proj"]) < 0.3
    assert min(kept[prefix + "self_attn.o_proj"], kept[prefix + "self_attn.q_proj"]) > 0.9


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"teal": {"share": 1.0}}], r"share of zeroed inputs in \[0, 1\)"),
        ([{"teal": {"block": 32}}], "only with kind: top_k"),
        ([{"teal": {}}, {"wina": {}}], "expected one step that selects inputs of qkv, found teal and wina"),
        ([{"activation_budget": {}}, {"gptq": {}}], "found none that respects activation_budget"),
        ([{"activation_budget": {"share": 0.95}}, {"teal": {}}], "lowest <= share <= highest"),
    ],
)
def test_recipes_that_cannot_work(steps: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"steps": steps})


def test_steps_that_come_too_late(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    for number, late in enumerate(("duquant", "smoothquant")):
        with pytest.raises(UserError, match="put teal or wina last"):
            run(tmp_path / "m", tmp_path / str(number), [{"teal": {}}, {late: {}}])
    with pytest.raises(UserError, match="self_attn.q_proj: expected a block that divides 32"):
        run(tmp_path / "m", tmp_path / "x", [{"teal": {"kind": "top_k", "block": 24}}])


def test_thresholds_are_those_of_what_meets_the_weights() -> None:
    """On a grid, the quantile is of rounded numbers."""
    x = torch.tensor([[0.1, 0.4, 1.0, 7.0]])
    assert TEAL(share=0.5).selection(0.5, x).threshold == pytest.approx(0.4)
