"""The exercises of docs/guide, run as they stand in the Markdown: a new pruning method, a new family."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path

import docs_pages as markdown
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import tulle
from checkpoints import PROSE, write_checkpoint
from tulle.compression import recipe as recipes
from tulle.errors import UserError
from tulle.models import description, families
from tulle.models.decoder import PlainDecoder

GUIDE = markdown.ROOT / "docs" / "guide"
METHOD, FAMILY = GUIDE / "add-a-method.md", GUIDE / "add-a-family.md"


def module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The exercise's code as the module that the page tells to make."""
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(source, name, "exec"), made.__dict__)
    return made


@pytest.mark.parametrize(("page", "title"), [(METHOD, "method"), (FAMILY, "family")])
def test_under_60_lines(page: Path, title: str) -> None:
    assert len(markdown.exercise(page, title).splitlines()) < 60


@pytest.fixture
def nowag(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    line = markdown.exercise(METHOD, "register method")
    ((name, place),) = ast.literal_eval("{" + line + "}").items()
    monkeypatch.setitem(recipes.METHODS, name, place)
    return module(place.split(":")[0], markdown.exercise(METHOD, "method"), monkeypatch)


def oracle(weight: np.ndarray, inputs: np.ndarray, pruned: int) -> np.ndarray:
    """The mask of the paper's algorithm 1 and objective, entry by entry in double precision."""
    rows, columns = weight.shape
    unit = np.empty_like(weight)
    for j in range(columns):
        unit[:, j] = weight[:, j] / np.sqrt(sum(w * w for w in weight[:, j]))
    for i in range(rows):
        unit[i] = unit[i] / np.sqrt(sum(w * w for w in unit[i]))
    cost = {(i, j): unit[i, j] ** 2 * sum(x * x for x in inputs[:, j]) for i in range(rows) for j in range(columns)}
    mask = np.ones(weight.shape, bool)
    for place in sorted(cost, key=lambda p: cost[p])[:pruned]:
        mask[place] = False
    return mask


def test_method_against_oracle(nowag: types.ModuleType) -> None:
    from tulle.methods.contract import LinearState, Statistics

    rng = np.random.default_rng(3)
    weight, inputs = rng.standard_normal((6, 10)), rng.standard_normal((40, 10)) * rng.uniform(0.1, 3, 10)
    state = LinearState("x", torch.tensor(weight).float(), torch.tensor(weight).float())
    statistics = Statistics()
    statistics.add(torch.tensor(inputs).float(), nowag.NoWag.needs)
    nowag.NoWag(sparsity=0.5).apply_linear(state, statistics)
    assert state.mask is not None
    np.testing.assert_array_equal(state.mask.numpy(), oracle(weight, inputs, 30))
    np.testing.assert_array_equal(state.weight.numpy(), (weight * oracle(weight, inputs, 30)).astype(np.float32))
    # Rows differ in how much they keep: a comparison within rows would give every row five.
    assert len(set(state.mask.sum(1).tolist())) > 1


def test_method_by_its_recipe(nowag: types.ModuleType, tmp_path: Path) -> None:
    """The recipe of the page through ``tulle.compress``, and an N:M pattern."""
    write_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(PROSE)
    content = yaml.safe_load(markdown.exercise(METHOD, "recipe"))
    content["calibration"] = {"samples": 4, "length": 64}
    for number, steps in enumerate([content["steps"], [{"nowag": {"pattern": "2:4"}}]]):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(content | {"steps": steps}))
        report = tulle.compress(tmp_path / "model", file, tmp_path / f"out{number}", calibration=[str(text)])
        assert all(abs(linear["sparsity"] - 0.5) < 1e-6 for linear in report["linears"])
        assert {linear["pattern"] for linear in report["linears"]} == ({None}, {"2:4"})[number]
        assert {linear["bits"] for linear in report["linears"]} == ({4}, {None})[number]


@pytest.fixture
def seed_oss(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = module("tulle.models.families.seed_oss", markdown.exercise(FAMILY, "family"), monkeypatch)
    return made


def test_family_is_the_one_in_the_house() -> None:
    file = Path(families.__path__[0]) / "seed_oss.py"
    assert file.read_text() == markdown.exercise(FAMILY, "family")


def compare(folder: Path, **settings: object) -> float:
    """Largest difference of the plain decoder's logits from transformers', over the largest logit."""
    write_checkpoint(folder, "seed_oss", **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    decoder = description.describe(json.loads((folder / "config.json").read_text()))
    prefixes = [layer.prefix for layer in decoder.layers]

    def block(index: int) -> dict[str, torch.Tensor]:
        prefix = prefixes[index]
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    outer = {name: t for name, t in tensors.items() if not name.startswith(tuple(prefixes))}
    tokens = torch.randint(0, decoder.vocabulary, (2, 50), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(tokens).logits
    found = PlainDecoder(decoder, block, outer)(tokens)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"attention_bias": False, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ],
    ids=["plain", "all biases, tied", "no biases, one KV head", "stretched positions"],
)
def test_family_against_transformers(seed_oss: types.ModuleType, tmp_path: Path, settings: dict) -> None:
    assert compare(tmp_path / "model", **settings) <= 1e-5


def test_family_has_the_defaults_of_transformers(seed_oss: types.ModuleType) -> None:
    """A config.json that says nothing but its type."""
    config = AutoConfig.for_model("seed_oss")
    decoder = description.describe({"model_type": "seed_oss"})
    attention = decoder.layers[0].mixer
    assert (decoder.hidden, decoder.vocabulary, len(decoder.layers), decoder.context) == (
        config.hidden_size, config.vocab_size, config.num_hidden_layers, config.max_position_embeddings,
    )  # fmt: skip
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    assert decoder.layers[0].feed_forward.intermediate == config.intermediate_size
    biases = [linear.bias for linear in decoder.layers[0].linears()]
    assert biases == [config.attention_bias] * 3 + [config.attention_out_bias] + [config.mlp_bias] * 3
    assert decoder.tied == config.tie_word_embeddings and decoder.final_norm.eps == config.rms_norm_eps


def test_family_refuses_what_it_does_not_know(seed_oss: types.ModuleType) -> None:
    with pytest.raises(UserError, match="use_sliding_window"):
        description.describe({"model_type": "seed_oss", "use_sliding_window": True})
