"""The block walker against a plain oracle: whole models, one sequence at a time, no blocks, no batches."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import PROSE, write_checkpoint
from tulle.compression import block_pass, walker
from tulle.compression.hidden_states import HiddenStates
from tulle.compression.recipe import Recipe, parse_recipe
from tulle.compression.walker import Walker
from tulle.core import statistics as sums
from tulle.core.hessian import Hessian
from tulle.core.transform import run
from tulle.methods.contract import GroupState, LinearState, Statistics
from tulle.models import decoder
from tulle.models.batches import batched
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import DecoderBlock
from tulle.models.description import ROLES, Decoder, LinearGroup, describe

LENGTHS = (40, 7, 31, 40, 12, 25, 3, 38)


def token_sequences() -> list[Tensor]:
    data = list(PROSE.encode())
    return [torch.tensor(data[100 * i : 100 * i + n]) for i, n in enumerate(LENGTHS)]


def walk(folder: Path, work: Path, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, LinearState]:
    checkpoint = Checkpoint.open(folder)
    model = checkpoint.describe()
    work.mkdir()
    found_by = Walker(model, recipe, batched(token_sequences(), 64), work, dtype=dtype)
    found_by.begin(checkpoint.read(model.embedding_name(checkpoint)).float())
    found = {}
    for layer in model.layers:
        found |= {state.name: state for state in found_by.block(layer.index, checkpoint.read_layer(layer)).linears}
    return found


@torch.no_grad()
def oracle(model: nn.Module, dense: nn.Module, recipe: Recipe) -> None:
    """Compresses ``model`` in place; every row sees all that was compressed before it."""
    sequences = token_sequences()
    rows = [group for group in _describe(model).layers[0].groups if recipe.steps_for(group.role)]
    for layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
        for row in rows:
            x = _inputs(model, layer.get_submodule(row.names[0]), sequences)
            dense_x = _inputs(dense, dense_layer.get_submodule(row.names[0]), sequences)
            hessian = Hessian(2 * x.T @ x / len(x), len(x))
            statistics = Statistics(len(x), hessian, x.norm(dim=0), x.abs().amax(0))
            lag = 0
            if recipe.calibration.target == "stream" and row.adds:
                before = {"o": "input_layernorm", "down": "post_attention_layernorm"}[row.role]
                lag = _inputs(dense, dense_layer.get_submodule(before), sequences)
                lag = lag - _inputs(model, layer.get_submodule(before), sequences)
            for name in row.names:
                linear, reference = layer.get_submodule(name), dense_layer.get_submodule(name)
                weight = linear.weight.clone()
                needs = set().union(*(step.method.needs for step in recipe.steps_for(row.role)))
                if recipe.calibration.target != "layer" and "hessian" in needs:
                    wanted = (reference(dense_x) - (linear.bias if linear.bias is not None else 0) + lag).double()
                    weight = _ridge(x.double(), wanted, weight.double(), recipe.calibration.target_damping).float()
                state = LinearState(name, weight, weight)
                for step in recipe.steps_for(row.role):
                    step.method.apply_linear(state, statistics)
                linear.weight.copy_(state.weight)


def _ridge(x: Tensor, wanted: Tensor, weight: Tensor, damping: float) -> Tensor:
    """argmin over W* of ‖T − X·W*ᵀ‖² + λ‖W* − W‖², λ = damping·mean diag(XᵀX), as one stacked least-squares problem."""
    root = (damping * (x * x).sum(0).mean()).sqrt()
    stacked = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(stacked, torch.cat([wanted, root * weight.T])).solution.T


def _inputs(model: nn.Module, module: nn.Module, sequences: list[Tensor]) -> Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
    for tokens in sequences:
        model(tokens[None])
    handle.remove()
    return torch.cat(seen)


def _describe(model: nn.Module) -> Decoder:
    return describe(model.config.to_dict())


STEPS = {
    "magnitude": [{"magnitude": {"sparsity": 0.5}}],
    "wanda": [{"wanda": {"sparsity": 0.5}}],
    "refit": [{"wanda": {"sparsity": 0.5, "refit": True}}],
    "rtn": [{"round_to_nearest": {"bits": 4, "group_size": 16, "targets": ["qkv", "down"]}}],
    "gptq": [{"gptq": {"bits": 8}}],
}


@pytest.mark.parametrize(
    ("model_type", "steps", "target"),
    [
        ("qwen2", "magnitude", "dense"),
        ("llama", "rtn", "layer"),
        ("llama", "wanda", "layer"),
        ("llama", "refit", "dense"),
        ("qwen2", "refit", "stream"),
        ("qwen3", "gptq", "dense"),
        ("mistral", "gptq", "stream"),
    ],
)
def test_equals_the_oracle(tmp_path: Path, model_type: str, steps: str, target: str) -> None:
    dense = write_checkpoint(tmp_path / "m", model_type, seed=1)
    model = write_checkpoint(tmp_path / "copy", model_type, seed=1)
    recipe = parse_recipe({"steps": STEPS[steps], "calibration": {"target": target}})
    found = walk(tmp_path / "m", tmp_path / "work", recipe)
    oracle(model, dense, recipe)
    wanted = {r for s in recipe.steps for r in s.targets}
    assert len(found) == 3 * sum(n for role, n in zip(ROLES, (3, 1, 2, 1), strict=True) if role in wanted)
    for name, state in found.items():
        expected = model.get_submodule(name).weight
        if steps == "gptq":
            # Rounding may fall the other way on a tie; 8-bit steps are 1 % of the largest weight.
            assert (state.weight - expected).abs().max() < 0.02 * expected.abs().max()
            assert ((state.weight - expected).abs() < 1e-3 * expected.abs().max()).float().mean() > 0.97
        else:
            torch.testing.assert_close(state.weight, expected, rtol=1e-3, atol=1e-5)


def test_not_sequential_sees_the_dense_block(tmp_path: Path) -> None:
    """With one pass per block, o's statistics come from a block whose q, k, v are still dense."""
    model = write_checkpoint(tmp_path / "m")
    steps = [{"magnitude": {"sparsity": 0.7, "targets": ["qkv"]}}, {"wanda": {"sparsity": 0.8, "targets": ["o"]}}]
    recipe = parse_recipe({"steps": steps, "calibration": {"target": "layer", "sequential": False}})
    found = walk(tmp_path / "m", tmp_path / "work", recipe)
    layer = model.model.layers[0]
    with torch.no_grad():
        x = _inputs(model, layer.self_attn.o_proj, token_sequences())
    weight = layer.self_attn.o_proj.weight.detach()
    state = LinearState("o", weight.clone(), weight)
    recipe.steps[1].method.apply_linear(state, Statistics(len(x), None, x.norm(dim=0)))
    assert torch.equal(found["model.layers.0.self_attn.o_proj"].mask, state.mask)


def test_output_errors_are_those_of_the_models(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", seed=2)
    copy = write_checkpoint(tmp_path / "copy", seed=2)
    recipe = parse_recipe({"steps": [{"magnitude": {"sparsity": 0.4}}], "calibration": {"target": "layer"}})
    checkpoint = Checkpoint.open(tmp_path / "m")
    model = checkpoint.describe()
    (tmp_path / "work").mkdir()
    found_by = Walker(model, recipe, batched(token_sequences(), 64), tmp_path / "work")
    found_by.begin(checkpoint.read("model.embed_tokens.weight"))
    results = [found_by.block(layer.index, checkpoint.read_layer(layer)) for layer in model.layers]
    with torch.no_grad():
        for result in results:
            for state in result.linears:
                copy.get_submodule(state.name).weight.copy_(state.weight)
        for result in results:
            for name, error in result.output_errors.items():
                y, reference = (_outputs(m, m.get_submodule(name)) for m in (copy, dense))
                assert error == pytest.approx(
                    float((y - reference).square().sum() / reference.square().sum()), rel=1e-4
                )
            y, reference = (_outputs(m, m.model.layers[result.index]) for m in (copy, dense))
            expected = float((y - reference).square().sum() / reference.square().sum())
            assert result.block_error == pytest.approx(expected, rel=1e-4)


def _outputs(model: nn.Module, module: nn.Module) -> Tensor:
    seen = []
    handle = module.register_forward_hook(lambda m, a, y: seen.append((y[0] if isinstance(y, tuple) else y)[0]))
    for tokens in token_sequences():
        model(tokens[None])
    handle.remove()
    return torch.cat(seen)


def test_batches_hold_every_token_once_and_keep_to_the_budget() -> None:
    sequences = token_sequences()
    batches = batched(sequences, 64)
    real = [b.tokens[i][b.valid[i]].tolist() for b in batches for i in range(len(b.tokens))]
    assert sorted(real) == sorted(s.tolist() for s in sequences)
    assert all(b.tokens.numel() <= 64 or len(b.tokens) == 1 for b in batches)


def test_hidden_states_round_trip(tmp_path: Path) -> None:
    batches = batched(token_sequences(), 64)
    states = HiddenStates(tmp_path / "x.bin", batches, 8)
    tensors = [torch.randn(*b.tokens.shape, 8) for b in batches]
    assert not states.is_whole()
    for i in reversed(range(len(batches))):
        states.write(i, tensors[i])
    assert states.is_whole()
    assert all(torch.equal(states.read(i), t) for i, t in enumerate(tensors))


STEPS_OF_MANY_KINDS = [
    [{"magnitude": {"sparsity": 0.5, "targets": ["down"]}}],
    [{"gptq": {"bits": 8}}],
    [
        {"sparsegpt": {"sparsity": 0.5}},
        {"gptq": {"bits": 4, "targets": ["qkv", "o"]}},
        {"round_to_nearest": {"bits": 8, "targets": ["down"]}},
    ],
    [{"kv_cache": {"bits": 8}}, {"activations": {"bits": 8}}, {"gptq": {"bits": 4}}],
]


@pytest.mark.parametrize("target", ["layer", "stream"])
@pytest.mark.parametrize("steps", STEPS_OF_MANY_KINDS)
def test_one_forward_pass_per_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list, target: str) -> None:
    """Each batch enters each block once on the dense and once on the compressed path, and every linear of it runs once,
    whatever the recipe's linear steps."""
    write_checkpoint(tmp_path / "m", "llama", seed=3)
    begun: list[int] = []
    groups: list[tuple[int, str]] = []
    start, run = DecoderBlock.steps, decoder.run_group

    def steps_of(block: DecoderBlock, *arguments: object) -> decoder.Steps:
        begun.append(block.layer.index)
        return start(block, *arguments)

    def run_group(block: DecoderBlock, group: LinearGroup, x: Tensor) -> tuple[Tensor, ...]:
        groups.append((block.layer.index, group.role))
        return run(block, group, x)

    monkeypatch.setattr(DecoderBlock, "steps", steps_of)
    monkeypatch.setattr(block_pass, "run_group", run_group)
    recipe = parse_recipe({"steps": steps, "calibration": {"target": target}})
    walk(tmp_path / "m", tmp_path / "work", recipe)
    batches = len(batched(token_sequences(), 64))
    layers = len(Checkpoint.open(tmp_path / "m").describe().layers)
    assert batches > 1 and layers > 1
    assert Counter(begun) == {index: 2 * batches for index in range(layers)}
    assert Counter(groups) == {(index, role): 2 * batches for index in range(layers) for role in ROLES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parked_on_disk_is_parked_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path / "m", "qwen2", seed=3)
    recipe = parse_recipe({"steps": [{"gptq": {"bits": 4}}]})
    found = []
    for limit in (walker.PARKED_SHARE, 0):
        monkeypatch.setattr(walker, "PARKED_SHARE", limit)
        work = tmp_path / f"work-{limit}"
        found.append(walk(tmp_path / "m", work, recipe, dtype))
        assert not list(work.glob("parked-*"))
    assert all(torch.equal(found[0][name].weight, found[1][name].weight) for name in found[0])


@pytest.mark.parametrize("steps", [[{"gptq": {"bits": 3}}], [{"duquant": {}}, {"gptq": {"bits": 3}}]])
@pytest.mark.parametrize("compiled", [True, False])
def test_statistics_of_bfloat16_are_exact_but_for_the_rounding_of_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, steps: list[dict[str, Any]]
) -> None:
    if not compiled:
        monkeypatch.setattr(sums, "takes_bfloat16", lambda *_: False)
    collect, seen = Walker._collect, Counter[str]()

    def checked(self: Walker, work: Any, group: GroupState, dense: Any, compressed: Any, fit: bool) -> Any:
        weight = torch.cat([linear.weight for linear in group.linears]).double()
        found, mismatch = result = collect(self, work, group, dense, compressed, fit)
        transform = group.linears[0].transform
        x, x_dense, behind = ([] for _ in range(3))
        for there, here, valid in zip(dense.given, compressed.given, self._masks(), strict=True):
            x.append(work.input_of(here.group, here.x)[valid])
            x_dense.append(run(transform, there.x[valid].float()))
            behind.append(there.residual[valid].double() - here.residual[valid].double())
        assert x[0].dtype == torch.bfloat16
        exact_x = torch.cat(x).double()
        assert found.tokens == found.hessian.tokens == len(exact_x)
        rounding = (2 * len(exact_x) + 4) * 2.0**-24
        assert is_sum(found.hessian.matrix * len(exact_x) / 2, exact_x, exact_x, exact_x.abs(), rounding)
        off = torch.cat(x_dense).double() - exact_x
        missed, terms = off @ weight.T, off.abs() @ weight.abs().T
        if group.role in ("o", "down"):
            missed, terms = missed + torch.cat(behind), terms + torch.cat(behind).abs()
        # Behind the product with W, of down only, its output and the sum with the stream's error are rounded too.
        roundings = 4 if len(weight) < weight.shape[1] else 1
        assert is_sum(mismatch, missed, exact_x, terms, 2 * rounding + 1.01 * roundings * 2.0**-8)
        seen[group.role] += bool(mismatch.any())
        return result

    monkeypatch.setattr(Walker, "_collect", checked)
    write_checkpoint(tmp_path / "m", "qwen2", seed=3)
    recipe = parse_recipe({"calibration": {"target": "stream"}, "steps": steps})
    walk(tmp_path / "m", tmp_path / "work", recipe, torch.bfloat16)
    assert min(seen[role] for role in ROLES) > 0


def is_sum(found: Tensor, a: Tensor, b: Tensor, terms: Tensor, share: float) -> bool:
    """aᵀb up to a share of each sum's terms, ``terms`` being how large those that a is summed from are."""
    return bool(((found - a.T @ b).abs() <= share * terms.T @ b.abs()).all())
