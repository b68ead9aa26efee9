"""The block walker against a plain oracle: whole models, one sequence at a time, no blocks, no batches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checkpoints import PROSE, write_checkpoint
from tulle.compression.recipe import Recipe, parse_recipe
from tulle.compression.walker import HiddenStates, Walker, batched
from tulle.core.hessian import Hessian
from tulle.methods.contract import LinearState, Statistics
from tulle.models.anatomy import ROLES
from tulle.models.checkpoint import Checkpoint
from tulle.models.skeleton import load_config

LENGTHS = (40, 7, 31, 40, 12, 25, 3, 38)


def token_sequences() -> list[Tensor]:
    data = list(PROSE.encode())
    return [torch.tensor(data[100 * i : 100 * i + n]) for i, n in enumerate(LENGTHS)]


def walk(folder: Path, work: Path, recipe: Recipe) -> dict[str, LinearState]:
    checkpoint = Checkpoint.open(folder)
    anatomy = checkpoint.anatomy()
    work.mkdir()
    walker = Walker(load_config(folder), anatomy, recipe, batched(token_sequences(), 64), work)
    walker.begin(checkpoint.read(checkpoint.embedding_name(anatomy)).float())
    found = {}
    for i in range(anatomy.layers):
        found |= {state.name: state for state in walker.block(i, checkpoint.read_block(anatomy, i)).linears}
    return found


@torch.no_grad()
def oracle(model: nn.Module, dense: nn.Module, recipe: Recipe) -> None:
    """Compresses ``model`` in place; every row sees all that was compressed before it."""
    sequences = token_sequences()
    rows = [row for row in _anatomy(model).rows if recipe.steps_for(row.role)]
    for layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
        for row in rows:
            x = _inputs(model, layer.get_submodule(row.linears[0]), sequences)
            dense_x = _inputs(dense, dense_layer.get_submodule(row.linears[0]), sequences)
            hessian = Hessian(2 * x.T @ x / len(x), len(x))
            statistics = Statistics(len(x), hessian, x.norm(dim=0), x.abs().amax(0))
            lag = 0
            if recipe.calibration.target == "stream" and row.residual:
                lag = _inputs(dense, dense_layer.get_submodule(row.residual), sequences)
                lag = lag - _inputs(model, layer.get_submodule(row.residual), sequences)
            for name in row.linears:
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


def _anatomy(model: nn.Module):  # noqa: ANN202
    from tulle.models.anatomy import anatomy

    return anatomy(model.config.to_dict())


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
    steps = [{"magnitude": {"sparsity": 0.7}}, {"wanda": {"sparsity": 0.8}}]
    recipe = parse_recipe({"steps": steps, "calibration": {"target": "layer", "sequential": False}})
    found = walk(tmp_path / "m", tmp_path / "work", recipe)
    layer = model.model.layers[0]
    with torch.no_grad():
        x = _inputs(model, layer.self_attn.o_proj, token_sequences())
    weight = layer.self_attn.o_proj.weight.detach()
    state = LinearState("o", weight.clone(), weight)
    for step in recipe.steps:
        step.method.apply_linear(state, Statistics(len(x), None, x.norm(dim=0)))
    assert torch.equal(found["model.layers.0.self_attn.o_proj"].mask, state.mask)


def test_output_errors_are_those_of_the_models(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", seed=2)
    model = write_checkpoint(tmp_path / "copy", seed=2)
    recipe = parse_recipe({"steps": [{"magnitude": {"sparsity": 0.4}}], "calibration": {"target": "layer"}})
    checkpoint = Checkpoint.open(tmp_path / "m")
    anatomy = checkpoint.anatomy()
    (tmp_path / "work").mkdir()
    walker = Walker(load_config(tmp_path / "m"), anatomy, recipe, batched(token_sequences(), 64), tmp_path / "work")
    walker.begin(checkpoint.read("model.embed_tokens.weight"))
    results = [walker.block(i, checkpoint.read_block(anatomy, i)) for i in range(anatomy.layers)]
    with torch.no_grad():
        for result in results:
            for state in result.linears:
                model.get_submodule(state.name).weight.copy_(state.weight)
        for result in results:
            for name, error in result.output_errors.items():
                y, reference = (_outputs(m, m.get_submodule(name)) for m in (model, dense))
                assert error == pytest.approx(
                    float((y - reference).square().sum() / reference.square().sum()), rel=1e-4
                )
            y, reference = (_outputs(m, m.model.layers[result.index]) for m in (model, dense))
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
