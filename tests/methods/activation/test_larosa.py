"""LaRoSA: principal components against what they promise, and what later steps see after the rotation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tulle.compression.block_work import DENSIFIED
from tulle.compression.job import compress
from tulle.errors import UserError
from tulle.methods.activation.larosa import by_kv_head, principal_components
from tulle.models.description import describe
from tulle.text.reading import Text, sequences
from tulle.training.model_folder import unpack

PROSE_TOKENS = torch.tensor([list(PROSE.encode())[:50]])
TEXT = Text((PROSE,), False, ("prose",))
LAROSA: dict[str, Any] = {"larosa": {}}


def run(folder: Path, output: Path, steps: list[dict[str, Any]]) -> Any:
    recipe = {"steps": steps, "calibration": {"samples": 6, "length": 40, "target": "layer"}}
    return compress(folder, recipe, output, calibration=TEXT)


def test_no_basis_keeps_more_in_its_first_coordinates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    moment = x.T @ x
    values, found = principal_components(moment)
    assert torch.allclose(found.T @ found, torch.eye(12, dtype=torch.float64), atol=1e-12)
    kept = (found.T @ moment.double() @ found).diagonal().cumsum(0)
    for _ in range(50):
        other = torch.linalg.qr(torch.randn(12, 12, generator=generator).double())[0]
        assert (kept >= (other.T @ moment.double() @ other).diagonal().cumsum(0) - 1e-6).all()
    # Ky Fan: the first k hold the k largest eigenvalues.
    assert torch.allclose(kept, values.cumsum(0)) and (values.diff() <= 0).all()
    assert torch.equal(found, principal_components(moment.clone())[1])
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_moments_of_heads_are_those_of_their_tokens() -> None:
    x = torch.randn(20, 6 * 4, generator=torch.Generator().manual_seed(1))
    heads = x.view(20, 6, 4)
    # Heads 0 to 2 share the first KV head, 3 to 5 the second.
    wanted = [sum(heads[:, h].T @ heads[:, h] for h in group) for group in (range(3), range(3, 6))]
    assert torch.allclose(by_kv_head(x.T @ x, 6, 2, 4), torch.stack(wanted), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_inputs_of_the_rotated_model_are_uncorrelated(model_type: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", model_type, num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", [LAROSA])
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    shape = describe(model.config.to_dict())
    seen: dict[str, list[torch.Tensor]] = {}
    for index in range(2):
        for role in ("qkv", "o", "gate_up"):
            name = shape.layers[index].prefix + shape.layers[index].group(role).names[0]
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, a, name=name: seen.setdefault(name, []).append(a[0].flatten(0, 1))
            )
    for tokens in sequences(TEXT, AutoTokenizer.from_pretrained(tmp_path / "m"), 40, 6, 0):
        model(tokens[None])
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    stream = sum(x.T @ x for name, x in inputs.items() if "o_proj" not in name)
    moments = [stream]
    for name, x in inputs.items():
        if "o_proj" in name:
            mixer = shape.layers[0].mixer
            moments += list(by_kv_head(x.T @ x, mixer.heads, mixer.kv_heads, mixer.head_dim))
    for moment in moments:
        energy = moment.diagonal()
        off = moment - energy.diag()
        # Weights are stored as they came, in float32; the calibration saw these very tokens.
        assert off.abs().max() < 1e-3 * energy.max()
        assert (energy.diff() < 1e-3 * energy.max()).all()


def test_the_budget_is_that_of_the_rotated_model(tmp_path: Path) -> None:
    """Steps that follow see the model after the rotation: as if it had been stored and read again."""
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    budget = [{"activation_budget": {"share": 0.5, "tokens": 60}}, {"teal": {"kind": "top_k"}}]
    run(tmp_path / "m", tmp_path / "one", [LAROSA, *budget])
    run(tmp_path / "m", tmp_path / "packed", [LAROSA])
    unpack(tmp_path / "packed", tmp_path / "rotated")
    run(tmp_path / "rotated", tmp_path / "two", budget)
    run(tmp_path / "m", tmp_path / "plain", budget)

    def kept(name: str) -> dict[str, int]:
        config = json.loads((tmp_path / name / "config.json").read_text())
        return {n: s["input_sparsity"]["keep"] for n, s in config["quantization_config"]["linears"].items()}

    assert kept("one") == kept("two") != kept("plain")


BUDGET: dict[str, Any] = {"activation_budget": {"share": 0.5, "tokens": 60}}
VALUES: dict[str, Any] = {"larosa": {"residual": False}}
STREAM: dict[str, Any] = {"quarot": {"heads": False, "across_heads": False, "down": False}}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"quarot": {}}, LAROSA], "found larosa after another"),
        ([LAROSA, {"quarot": {}}], "found quarot after another"),
        ([LAROSA, {"quarot": {"residual": False}}], "basis of the values, found quarot after another"),
        ([{"quarot": {"residual": False}}, LAROSA], "residual stream or the values, found larosa after another"),
        ([LAROSA, {"spinquant": {"steps": 1}}], "found spinquant after another"),
        ([LAROSA, {"permute_channels": {}}], "expected permute_channels before a rotation"),
        ([LAROSA, LAROSA], "found larosa after another"),
        ([VALUES, LAROSA], "found larosa after another"),
        ([{"larosa": {"targets": ["down"]}}], "leave the step out"),
        ([{"larosa": {"residual": False, "heads": False}}], "leave the step out"),
        ([BUDGET, LAROSA, {"teal": {}}], "found larosa after that; put larosa first"),
        ([BUDGET, VALUES, {"teal": {}}], "put larosa first"),
    ],
)
def test_steps_that_contradict_each_other(steps: Any, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "m", tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("first", [STREAM, {"larosa": {"targets": ["qkv"]}}])
def test_stream_and_values_may_be_turned_by_two_steps(first: dict[str, Any], tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", [first, VALUES])
    expected = dense(PROSE_TOKENS).logits
    found = tulle.hf.load(tmp_path / "out", dtype=torch.float32)(PROSE_TOKENS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_targets_choose_what_is_rotated(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path / "m", num_hidden_layers=1, tie_word_embeddings=True).state_dict()
    for targets, changed in ((["o"], "vo"), (["qkv"], None)):
        out = tmp_path / targets[0]
        run(tmp_path / "m", out, [{"larosa": {"targets": targets}}])
        stored = tulle.hf.load(out, dtype=torch.float32).state_dict()
        found = {name for name in stored if not torch.equal(stored[name], before[name])}
        # A rotation of the stream changes every linear, the norms and the embedding, which comes apart from the head.
        wanted = {f"model.layers.0.self_attn.{x}_proj.weight" for x in changed} if changed else set(before)
        assert found == wanted


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e38)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="expected finite calibration activations"):
        run(tmp_path / "m", tmp_path / "out", [LAROSA])


def test_zeros_that_a_rotation_fills_are_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    run(tmp_path / "m", tmp_path / "packed", [{"magnitude": {"sparsity": 0.5}}])
    unpack(tmp_path / "packed", tmp_path / "pruned")
    report = run(tmp_path / "pruned", tmp_path / "out", [VALUES])
    assert DENSIFIED in json.dumps(report, ensure_ascii=False)


@torch.no_grad()
def test_a_training_stage_can_start_rotated(tmp_path: Path) -> None:
    """As ``prune: {steps: [larosa: {}]}``: a dense model of the same function to train on."""
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "packed", [LAROSA])
    unpack(tmp_path / "packed", tmp_path / "rotated")
    config = json.loads((tmp_path / "rotated" / "config.json").read_text())
    assert "quantization_config" not in config
    model = type(dense).from_pretrained(tmp_path / "rotated", dtype=torch.float32)
    expected = dense(PROSE_TOKENS).logits
    assert (model(PROSE_TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
