"""Recovery: gradients against transformers and autograd, masks and grids held, a killed run on the same curve."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tulle
from checkpoints import PROSE, write_checkpoint
from family_folders import write_family
from tulle.cli.recover import recover as recover_command
from tulle.compression.job import compress
from tulle.compression.recipe import Recover, read_recipe
from tulle.core.grid import Grid, find_steps, storable_step
from tulle.core.grid import Quantised as Coded
from tulle.errors import UserError
from tulle.format.spec import QuantizationConfig
from tulle.methods.quantize.round_to_nearest import round_to_nearest
from tulle.methods.train.codes import TrainedCodes, TrainedSteps, whole_numbers
from tulle.models.checkpoint import Checkpoint, write_shard
from tulle.models.decoder import DecoderBlock
from tulle.models.rewrite import DenseModel
from tulle.text.reading import Text
from tulle.training import compress as recipe_room
from tulle.training import distil as room
from tulle.training.recover import recover
from tulle.training.student import Student, Teacher

pytestmark = pytest.mark.usefixtures("no_pages")

TEXT = Text((PROSE,), False, ("prose",))
CALIBRATION = {"samples": 6, "length": 48}
RECIPES: dict[str, dict[str, Any]] = {
    "sparse50-w4": {"steps": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 16}}]},
    "everything": {
        "steps": [
            {"wanda": {"pattern": "2:4", "targets": ["o", "down"]}},
            {"kv_cache": {"bits": 4}},
            {"duquant": {"targets": ["qkv", "gate_up"]}},
            {"activations": {"bits": 8, "targets": ["qkv", "gate_up"]}},
            {"gptq": {"bits": 3, "scale_bits": 8, "symmetric": False, "targets": ["qkv", "gate_up", "down"]}},
            {"round_to_nearest": {"bits": 6, "targets": ["embedding", "head"]}},
        ]
    },
    "inputs": {"steps": [{"teal": {"share": 0.4}}, {"gptq": {"bits": 4, "group_size": 16}}]},
    "floats": {
        "steps": [
            {"wanda": {"sparsity": 0.6, "targets": ["down"]}},
            {"gptq": {"format": "nvfp4", "targets": ["qkv", "gate_up"]}},
            {"gptq": {"format": "mxfp4", "targets": ["o", "down", "embedding", "head"]}},
        ]
    },
    "rotated": {"steps": [{"quarot": {}}, {"gptq": {"bits": 4, "group_size": 16}}]},
}
SETTINGS = Recover(tokens=6 * 64, context=16, batch=4, rate=2e-2, warmup_steps=1, evaluate_every=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense model, and one compressed by every recipe."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "dense", "qwen2")
    for name, recipe in RECIPES.items():
        ordered = sorted(recipe["steps"], key=lambda step: next(iter(step)) in ("wanda", "gptq", "round_to_nearest"))
        content = {"calibration": CALIBRATION, "steps": ordered}
        compress(folder / "dense", content, folder / name, calibration=TEXT)
    # Its layers share keys and values, and have inputs of their own.
    write_family(folder / "gemma4", "gemma4_text", 2)
    steps = [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": "auto-32"}}]
    compress(folder / "gemma4", {"calibration": CALIBRATION, "steps": steps}, folder / "gemma4-w4", calibration=TEXT)
    return {name: folder / name for name in ("dense", *RECIPES, "gemma4", "gemma4-w4")}


def test_codes_follow_their_weights() -> None:
    """Ŵ is the grid's, gradients pass where the grid reaches and the mask keeps, and the result means Ŵ."""
    torch.manual_seed(0)
    dense, mask = torch.randn(6, 32), torch.rand(6, 32) < 0.6
    grid = Grid(3, 8, symmetric=False)
    scale, zero = find_steps(dense, grid)
    start = Coded(grid, torch.randint(0, 8, dense.shape, dtype=torch.int16), scale, zero)
    trained = TrainedCodes(start, mask)
    assert torch.equal(trained(torch.float32), start.dequantise(mask))
    with torch.no_grad():
        trained.weight += 4 * torch.randn_like(dense)
    pull = torch.randn_like(dense)
    (trained(torch.float32) * pull).sum().backward()
    step, z = scale.repeat_interleave(8, 1), zero.repeat_interleave(8, 1)
    free = (trained.weight / step).round() + z
    assert torch.equal(trained.weight.grad, pull * mask * (free >= 0) * (free <= 7))
    assert 0 < int((trained.weight.grad == 0).sum()) - int((~mask).sum()) < mask.numel() // 2
    assert torch.equal(trained.result().dequantise(mask), trained(torch.float32))


@pytest.mark.parametrize("row", [False, True])
def test_steps_follow_their_ratios(row: bool) -> None:
    """∂L/∂r against autograd of Δ·r·whole, and the steps are ones that a file stores."""
    torch.manual_seed(1)
    row_scale = torch.full((5,), 2.0**-9) if row else None
    scale = torch.randint(3, 200, (5, 4)).float() * 2.0**-9
    start = Coded(
        Grid(4, 8, True, 8 if row else 16), torch.randint(-8, 8, (5, 32)).short(), scale, scale * 0, row_scale
    )
    trained, mask = TrainedSteps(scale, start.grid, row_scale), torch.rand(5, 32) < 0.5
    whole = whole_numbers(start, mask)
    assert torch.equal(trained(whole, torch.float32), start.dequantise(mask))
    with torch.no_grad():
        trained.ratio += 0.3 * torch.rand_like(scale)
    pull = torch.randn(5, 32)
    (trained(whole, torch.float32) * pull).sum().backward()
    ratio = trained.ratio.detach().clone().requires_grad_()
    ((scale * ratio).repeat_interleave(8, 1) * whole * pull).sum().backward()
    torch.testing.assert_close(trained.ratio.grad, ratio.grad)
    result = trained.result(start)
    assert torch.equal(result.dequantise(mask), trained(whole, torch.float32))
    stored = result.scale / 2.0**-9 if row else result.scale.bfloat16().float() / result.scale
    assert torch.equal(stored, stored.round()) and not torch.equal(result.scale, scale)


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_floats_of_four_bits_are_trained_on_their_grid(form: Any) -> None:
    torch.manual_seed(2)
    start = round_to_nearest(torch.randn(6, 64), Grid.of(4, None, True, format=form))
    row = None if start.row_scale is None else start.row_scale[:, None]
    codes, steps = TrainedCodes(start, None), TrainedSteps(start.scale, start.grid, start.row_scale)
    whole = whole_numbers(start, None)
    with torch.no_grad():
        codes.weight += 0.5 * torch.randn(6, 64)
        steps.ratio += 0.9 * torch.rand_like(start.scale)
    codes(torch.float32).sum().backward()
    reached = (codes.weight / start.scale.repeat_interleave(64 // start.scale.shape[1], 1)).round().abs() <= 12
    assert torch.equal(codes.weight.grad, reached.float()) and not bool(reached.all())
    for result, found in ((codes.result(), codes(torch.float32)), (steps.result(start), steps(whole, torch.float32))):
        assert torch.equal(result.dequantise(), found)
        assert set(result.codes.abs().unique().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}
        assert torch.equal(result.scale, storable_step(result.scale, row, result.grid))
    assert not torch.equal(steps.result(start).scale, start.scale)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_the_student_is_the_packed_model(models: dict[str, Path], recipe: str) -> None:
    tokens = torch.tensor(list(PROSE.encode()[:60])).reshape(2, 30)
    student = Student(Checkpoint.open(models[recipe]), "codes", "cpu", torch.float32)
    teacher = Teacher(DenseModel.open(models["dense"]), "cpu", torch.float32)
    for ours, folder in ((student, recipe), (teacher, "dense")):
        load = tulle.load if folder == recipe else AutoModelForCausalLM.from_pretrained
        wanted = load(models[folder], dtype=torch.float32)(tokens).logits
        hidden = ours.embed(tokens)
        for index in range(3):
            hidden = ours.block(index, hidden, tokens)
        torch.testing.assert_close(ours.logits(hidden.flatten(0, 1)), wanted.flatten(0, 1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(("whole", "small"), [("dense", "sparse50-w4"), ("gemma4", "gemma4-w4")])
def test_gradients_are_those_of_the_whole_loss(
    models: dict[str, Path], whole: str, small: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' models, one autograd graph through everything."""
    monkeypatch.setattr(room, "GRAPH_SHARE", float(keeps))
    monkeypatch.setattr(room, "LOGITS", 5 * 257)
    settings = SETTINGS.model_copy(update={"cross_entropy": 0.3, "kl": 0.7, "squarehead": 0.2, "temperature": 2.0})
    rows = torch.tensor(list(PROSE.encode()[:51])).reshape(3, 17)
    packed = Checkpoint.open(models[small])
    student = Student(packed, "codes", "cpu", torch.float32)
    teacher = Teacher(DenseModel.open(models[whole]), "cpu", torch.float32)
    ours = room.Distillation(student, teacher, settings, room.Windows([], 1, 0), "cpu", True)
    terms = ours._differentiate(rows)

    plain = AutoModelForCausalLM.from_pretrained(models[whole], dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(models[whole], dtype=torch.float32)
    with torch.no_grad():
        for name, module in tulle.load(models[small], dtype=torch.float32).named_modules():
            if hasattr(module, "dequantise"):
                plain.get_submodule(name).weight.copy_(module.dequantise())
    states: dict[str, list[torch.Tensor]] = {"plain": [], "dense": []}
    for which, model in (("plain", plain), ("dense", dense)):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, i, out, into=states[which]: into.append(out))
    given, wanted = plain(rows[:, :-1]).logits, dense(rows[:, :-1]).logits.detach()
    kl = torch.nn.functional.kl_div(
        (given / 2).log_softmax(-1), (wanted / 2).log_softmax(-1), reduction="sum", log_target=True
    ) / (3 * 16)
    entropy = torch.nn.functional.cross_entropy(given.flatten(0, 1), rows[:, 1:].flatten())
    squares = sum(
        (s - t.detach()).square().mean() / (t.detach().square().mean() + 1e-6)
        for s, t in zip(states["plain"], states["dense"], strict=True)
    )
    (0.7 * 4 * kl + 0.3 * entropy + 0.2 * squares).backward()
    found = {name: float(t.detach()) for name, t in (("kl", kl), ("cross_entropy", entropy), ("squarehead", squares))}
    assert terms == pytest.approx(found, rel=1e-4)
    named = dict(plain.named_parameters())
    checked = 0
    for block in student.blocks:
        prefix = block.layer.prefix
        for (norm, _), gain in zip(block.layer.norms(), block.norms, strict=True):
            torch.testing.assert_close(gain.grad, named[f"{prefix}{norm.name}.weight"].grad, rtol=1e-3, atol=1e-6)
        for linear, weight in zip(block.layer.linears(), block.weights, strict=True):
            wanted_gradient = named[f"{prefix}{linear.name}.weight"].grad * weight.mask
            torch.testing.assert_close(weight.weight.grad, wanted_gradient, rtol=1e-3, atol=1e-6)
            checked += 1
        for name, bias in block._bias.items():
            torch.testing.assert_close(bias.grad, named[f"{prefix}{name}.bias"].grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(student.norm["weight"].grad, named["model.norm.weight"].grad, rtol=1e-3, atol=1e-6)
    assert checked == sum(len(layer.linears()) for layer in student.decoder.layers)


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "nemotron_h"])
def test_gradients_of_other_mixers_and_of_experts_are_slopes(family: str, tmp_path: Path, monkeypatch) -> None:
    """Delta nets, latent attention, Mamba-2 and experts: the loss along the gradient of every tensor. Routers are not
    trained, and experts that no token goes to have no gradient."""
    write_family(tmp_path / "dense", family, 1)
    recipe = {"calibration": {"samples": 2, "length": 24}, "steps": [{"wanda": {"sparsity": 0.3}}]}
    compress(tmp_path / "dense", recipe, tmp_path / "packed", calibration=TEXT)
    student = Student(Checkpoint.open(tmp_path / "packed"), "codes", "cpu", torch.float32)
    teacher = Teacher(DenseModel.open(tmp_path / "dense"), "cpu", torch.float32)
    ours = room.Distillation(student, teacher, SETTINGS, room.Windows([], 1, 0), "cpu", True)
    rows = torch.tensor(list(PROSE.encode()[:34])).reshape(2, 17)

    routes, chosen = DecoderBlock.routes, []

    def watched(block: DecoderBlock, logits: torch.Tensor) -> Any:
        found = routes(block, logits)
        chosen.append((found.experts, found.tokens))
        return found

    monkeypatch.setattr(DecoderBlock, "routes", watched)

    def loss() -> float:
        chosen.clear()
        terms = ours._differentiate(rows)
        return SETTINGS.kl * terms["kl"] + SETTINGS.squarehead * terms["squarehead"]

    loss()
    names = {}
    for block in student.blocks:
        named = zip(block._number, block.weights, strict=True)
        names |= {weight.weight: block.layer.prefix + name for name, weight in named}
    routers = [p for p, name in names.items() if name.endswith(("mlp.gate", "mixer.gate"))]
    assert routers and not any(p.requires_grad for p in routers)
    trained = {p: p.grad.clone() for p in student.parameters() if p.grad is not None}
    idle = [p for p in student.parameters() if p.requires_grad and p.grad is None]
    assert all(".experts." in names[p] for p in idle if p in names)
    checked = 0
    steep = sorted(trained, key=lambda p: -float(trained[p].norm() * p.detach().norm()))[:: max(1, len(trained) // 12)]
    for parameter in steep:
        gradient, start = trained[parameter], parameter.detach().clone()
        step = gradient * (1e-4 * start.norm() / gradient.norm())
        ends, ways = [], []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(start + sign * step)
            ends.append(loss())
            ways.append([part.tolist() for pair in chosen for part in pair])
        with torch.no_grad():
            parameter.copy_(start)
        if ways[0] != ways[1]:
            continue  # a token goes elsewhere, and the loss jumps
        checked += 1
        slope, noise = (ends[0] - ends[1]) / (2 * float(step.norm())), 1e-6 / float(step.norm())
        assert slope == pytest.approx(float(gradient.norm()), rel=0.05, abs=noise)
    assert checked >= 8


def test_training_steps_reach_inputs_and_caches(models: dict[str, Path]) -> None:
    """Every parameter of a model with transforms, rounded inputs, caches and selections gets a gradient."""
    for recipe in ("everything", "inputs", "rotated"):
        student = Student(Checkpoint.open(models[recipe]), "codes", "cpu", torch.float32)
        teacher = Teacher(DenseModel.open(models["dense"]), "cpu", torch.float32)
        rows = torch.tensor(list(PROSE.encode()[:51])).reshape(3, 17)
        room.Distillation(
            student, teacher, SETTINGS, room.Windows([], 1, 0), "cpu", recipe != "rotated"
        )._differentiate(rows)
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize(("temperature", "entropy"), [(1.0, 0.0), (1.0, 0.5), (2.0, 0.0), (0.7, 0.3)])
def test_the_loss_at_the_head(temperature: float, entropy: float, monkeypatch) -> None:
    """Value and gradient in closed form, a few rows at a time, against autograd."""
    monkeypatch.setattr(room, "CACHED_LOGITS", 2 * 11)
    torch.manual_seed(3)
    given, taught = (4 * torch.randn(7, 11, dtype=torch.float64)).requires_grad_(), 4 * torch.randn(7, 11).double()
    targets = torch.randint(11, (7,))
    kl = torch.nn.functional.kl_div(
        (given / temperature).log_softmax(-1), (taught / temperature).softmax(-1), reduction="sum"
    )
    ce = torch.nn.functional.cross_entropy(given, targets, reduction="sum")
    (0.8 * temperature**2 * kl + entropy * ce).backward()
    found = given.detach().clone()
    settings = Recover(kl=0.8, temperature=temperature, cross_entropy=entropy)
    terms = room.output_loss(found, taught, targets, settings)
    assert terms == pytest.approx({"kl": float(kl.detach()), "cross_entropy": float(ce.detach())})
    torch.testing.assert_close(found, given.grad)


def specs(folder: Path) -> dict[str, Any]:
    return QuantizationConfig.from_json(Checkpoint.open(folder).config["quantization_config"]).linears


@pytest.mark.parametrize("train", ["codes", "steps"])
def test_recovered(models: dict[str, Path], train: str, tmp_path: Path) -> None:
    """Closer to the dense model; the same specs, masks and grids; what is loaded is what was trained."""
    source = models["sparse50-w4"]
    settings = SETTINGS.model_copy(update={"train": train, "tokens": 24 * 64, "rate": 2e-2})
    report = recover(source, models["dense"], tmp_path / "out", settings, text=TEXT)
    curve = report["recover"]["curve"]
    assert curve[-1]["held_out_kl"] < 0.9 * curve[0]["held_out_kl"]
    assert [row["step"] for row in curve] == list(range(0, 25, 2)) and curve[-1]["tokens"] == 24 * 64
    assert specs(tmp_path / "out") == specs(source)
    before, after = (load_all(folder) for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"values", "weight", "bias"} if train == "codes" else {"scale", "weight", "bias"})
    assert all(before[name].dtype == after[name].dtype for name in before)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert read_recipe(recipe).recover == settings
    assert report["evaluation"] is None and report["recover"]["hidden_states"]
    assert report["reload"]["tokens"] == 4 * 16 and report["reload"]["difference"] < 1e-5
    assert not (tmp_path / "out.partial").exists()


def test_a_recovered_model_is_read_again(models: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """With all that stands in front of linears; and one that is not what was trained is refused."""
    settings = SETTINGS.model_copy(update={"tokens": 64})
    for recipe in ("everything", "inputs"):
        report = recover(models[recipe], models["dense"], tmp_path / recipe, settings, text=TEXT)
        assert report["reload"]["difference"] <= report["reload"]["allowed"] / 4

    def damaged(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_shard(file, {n: 2 * t if n.endswith("1.mlp.down_proj.scale") else t for n, t in tensors.items()})

    monkeypatch.setattr("tulle.training.recover.write_shard", damaged)
    with pytest.raises(UserError, match="losses of its tokens .* nats from what it gave before"):
        recover(models["sparse50-w4"], models["dense"], tmp_path / "out", settings, text=TEXT)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").rglob("config.json"))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_killed_run_goes_on(models: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """From its newest checkpoint, between two points of the curve, to the same bytes and the same curve."""
    monkeypatch.setattr(room, "CHECKPOINT_SECONDS", -1.0)
    source = models["sparse50-w4"]
    whole = recover(source, models["dense"], tmp_path / "whole", SETTINGS, text=TEXT)
    step = room.Distillation._step

    def killed(self: Any, number: int) -> dict[str, float]:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(room.Distillation, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(source, models["dense"], tmp_path / "out", SETTINGS, text=TEXT)
    with pytest.raises(UserError, match="unfinished run"):
        recover(source, models["dense"], tmp_path / "out", SETTINGS, text=TEXT)
    again = recover(source, models["dense"], tmp_path / "out", SETTINGS, text=TEXT, resume=True)
    assert again["recover"]["curve"] == whole["recover"]["curve"]
    one, two = load_all(tmp_path / "whole"), load_all(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_recipe_that_recovers(models: dict[str, Path], tmp_path: Path) -> None:
    """Into a folder that is there already, and empty."""
    content = RECIPES["sparse50-w4"] | {"calibration": CALIBRATION, "recover": SETTINGS.model_dump()}
    (tmp_path / "out").mkdir()
    report = tulle.compress(models["dense"], content, tmp_path / "out", calibration=TEXT)
    assert report["recover"]["tokens"] == SETTINGS.tokens and report["totals"]["sparsity"] == 0.5
    assert report["recipe"]["recover"] == SETTINGS.model_dump()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    for again in (content, content | {"steps": content["steps"][:1], "then": content["steps"][1:]}):
        with pytest.raises(UserError, match="found .*out in use"):
            tulle.compress(models["dense"], again, tmp_path / "out", calibration=TEXT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with pytest.raises(UserError, match="without recover"):
        compress(models["dense"], content, tmp_path / "other", calibration=TEXT)


def test_quantised_after_recovering(models: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """``then``: masks are those of the pruning, the report tells all, and a killed run goes on."""
    content = {
        "calibration": CALIBRATION,
        "steps": [{"sparsegpt": {"sparsity": 0.5}}],
        "recover": SETTINGS.model_dump(),
        "then": [{"gptq": {"bits": 4, "group_size": 16}}],
    }
    report = tulle.compress(models["dense"], content, tmp_path / "out", calibration=TEXT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["model"] == str(models["dense"]) and len(report["recover"]["curve"]) == 4
    assert set(report["seconds"]["steps"]) == {"sparsegpt", "gptq"}
    found = specs(tmp_path / "out")
    assert {(spec.bits, spec.sparse) for spec in found.values()} == {(4, True)}
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe == read_recipe(content).to_json() == report["recipe"]
    # The same zeros as pruning alone leaves; a kept weight may round to zero but keeps its place.
    pruned = {"steps": content["steps"], "calibration": CALIBRATION}
    compress(models["dense"], pruned, tmp_path / "pruned", calibration=TEXT)
    for name, spec in found.items():
        assert spec.nonzeros == specs(tmp_path / "pruned")[name].nonzeros
        before, after = (load_all(tmp_path / folder)[f"{name}.mask"] for folder in ("pruned", "out"))
        assert torch.equal(before, after)
    with monkeypatch.context() as patch:
        patch.setattr(recipe_room, "unpack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tulle.compress(models["dense"], content, tmp_path / "again", calibration=TEXT)
    again = tulle.compress(models["dense"], content, tmp_path / "again", calibration=TEXT, resume=True)
    one, two = load_all(tmp_path / "out"), load_all(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert tulle.compress(models["dense"], content, tmp_path / "again", calibration=TEXT, resume=True) == again
    for wrong, line in (
        (
            {"steps": content["then"], "recover": {}, "then": content["then"]},
            "before recover and then, found gptq",
        ),
        ({"steps": content["steps"], "then": content["then"]}, "without recover"),
        ({"steps": content["steps"], "recover": {}, "then": {}}, "list of steps"),
        ({"steps": [{"larosa": {}}], "recover": {}, "then": content["then"]}, "before recover and then, found larosa"),
        ({"steps": [{"teal": {}}], "recover": {}, "then": content["then"]}, "before recover and then, found teal"),
        ({"steps": [{"wina": {}}], "recover": {}, "then": content["then"]}, "step of then that selects inputs of down"),
    ):
        with pytest.raises(UserError, match=line):
            read_recipe(wrong)


def test_inputs_are_selected_again_after_recovering(models: dict[str, Path], tmp_path: Path) -> None:
    """By the shares that a budget gave before, which the step of ``then`` does not know by itself."""
    budget, select = {"activation_budget": {"share": 0.5, "tokens": 64}}, {"wina": {"share": 0.5}}
    content = {
        "calibration": CALIBRATION,
        "steps": [budget, select],
        "recover": SETTINGS.model_dump(),
        "then": [select, {"gptq": {"bits": 4, "group_size": 16}}],
    }
    tulle.compress(models["dense"], content, tmp_path / "out", calibration=TEXT)
    compress(models["dense"], content | {"recover": None, "then": None}, tmp_path / "first", calibration=TEXT)
    given, found = specs(tmp_path / "first"), specs(tmp_path / "out")
    assert len({spec.input_sparsity.keep for spec in given.values()}) > 2
    assert {n: s.input_sparsity for n, s in found.items()} == {n: s.input_sparsity for n, s in given.items()}
    assert {spec.bits for spec in found.values()} == {4}


def test_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    source, dense = models["sparse50-w4"], models["dense"]
    write_checkpoint(tmp_path / "deep", "qwen2", num_hidden_layers=2)
    for settings, given, text, line in (
        (SETTINGS, tmp_path / "deep", TEXT, "expected a dense model of 3 blocks"),
        (SETTINGS, dense, Text(("short",), False, ()), "windows"),
        (SETTINGS.model_copy(update={"context": 128, "tokens": 4096}), dense, TEXT, "expected a context below"),
        (SETTINGS.model_copy(update={"tokens": 63}), dense, TEXT, "expected tokens for one step of 64"),
    ):
        with pytest.raises(UserError, match=line):
            recover(source, given, tmp_path / "out", settings, text=text)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    alone = SETTINGS.model_copy(update={"kl": 0.0})
    with pytest.raises(UserError, match="residual stream was rotated"):
        recover(models["rotated"], dense, tmp_path / "out", alone, text=TEXT)
    with pytest.raises(UserError, match="made by tulle compress"):
        recover(dense, dense, tmp_path / "out", SETTINGS, text=TEXT)
    for wrong in ({"kl": 0, "squarehead": 0}, {"tokens": 0}, {"rates": 1}, {"train": "all"}):
        with pytest.raises(UserError, match="recover|tokens|rate|train"):
            read_recipe(RECIPES["inputs"] | {"recover": wrong})


def test_the_command_has_the_recipe_s_defaults() -> None:
    given = inspect.signature(recover_command).parameters
    for name, field in Recover.model_fields.items():
        assert name not in given or given[name].default == field.default, name
    assert {"tokens", "train", "context", "batch", "rate"} <= given.keys()
