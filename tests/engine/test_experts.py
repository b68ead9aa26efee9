"""Experts in the engine: each packed in its own way, in every layout, alone and among others, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from isas import logits_by_isa
from native_engines import Runner, decoder
from safetensors.torch import load_file, save_file
from test_batch_invariance import differing
from test_families import TOKENS, difference, wanted

from family_folders import write_family
from tiny_models import as_torch, pack_random
from tulle.engine import Engine
from tulle.engine.checkpoint import Source
from tulle.engine.choose import FirstBlock, _Arrays
from tulle.engine.layout import ModelLayout
from tulle.engine.native_model import Mixture, Model
from tulle.engine.prepare import convert
from tulle.engine.settings import settings_of
from tulle.format.spec import InputSparsitySpec, LinearSpec, QuantizationConfig
from tulle.models.source import open_source

HALF = InputSparsitySpec(kind="top_k", keep=32)
SCHEMES: list[dict[str, Any] | None] = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 64, "sparse": True, "input_sparsity": HALF},
    None,
    {"bits": 8, "input_bits": 8},
    {"bits": 2, "input_sparsity": InputSparsitySpec(kind="top_k", keep=16, unit=4)},
    {"bits": 4, "group_size": 32, "input_sparsity": InputSparsitySpec(kind="relu")},
    {"bits": 3, "symmetric": False},
    {"bits": 8, "sparse": True},
]
"""Of expert i's linears, and of the shared one; None: left in floats."""
SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_experts": 7,
    "num_experts_per_tok": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "mlp_only_layers": [],
    "use_sliding_window": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model whose experts are all packed differently."""
    found = write_family(tmp_path_factory.mktemp("experts") / "m", "qwen2_moe", 5, **SIZES)
    state = load_file(found / "model.safetensors")
    specs: dict[str, LinearSpec] = {}
    for number, name in enumerate(sorted(state)):
        linear = name.removesuffix(".weight")
        _, _, rest = linear.partition(".experts.")
        scheme = SCHEMES[int(rest.split(".")[0])] if rest else SCHEMES[-1] if ".shared_expert." in linear else None
        if scheme is None:
            continue
        specs[linear], arrays = pack_random(state.pop(name).numpy(), number, **scheme)
        state |= {f"{linear}.{suffix}": as_torch(array) for suffix, array in arrays.items()}
    assert len(specs) == 2 * 3 * 7
    save_file(state, found / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((found / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig(specs, {"steps": []}).to_json()
    (found / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("layout", list(ModelLayout))
def test_each_packed_in_its_own_way(folder: Path, layout: ModelLayout) -> None:
    expected = wanted(folder, TOKENS, packed=True)
    for threads in (1, 3):
        engine = Engine(folder, threads, sequences=2, cache="f32", head="as stored", layout=layout)
        found = engine.forward(TOKENS)
        assert difference(found, expected) <= 5e-3  # inputs of codes are rounded to 16 bits
        alone = [engine.forward([token], 1, place) for place, token in enumerate(TOKENS)]
        assert np.array_equal(np.concatenate(alone), found)


@pytest.mark.parametrize("layout", [ModelLayout.SPARSE, ModelLayout.DENSE_INPUT_MAJOR])
def test_same_bits_in_any_company(folder: Path, layout: ModelLayout) -> None:
    assert differing(decoder(folder, layout), 2) == []


def test_instruction_sets_agree(folder: Path, tmp_path: Path) -> None:
    first, *others = logits_by_isa(folder, tmp_path, f"engine.forward({TOKENS})", layout="input-major")
    for other in others:
        assert difference(other, first) < 1e-4  # some codes of inputs lie between two whole numbers


def test_only_chosen_experts_are_read(tmp_path: Path) -> None:
    """As counted, and as a weight that is not a number shows."""
    model = decoder(write_family(tmp_path / "m", "qwen3_moe", 1, num_experts=6, num_experts_per_tok=2))
    runner = Runner(model)
    expected = runner.forward([5])
    assert runner.native.take_bytes_per_token() == runner.native.weight_bytes
    chosen = 0
    mixture = mixture_of(model)
    for expert in mixture.experts:
        values = expert.down.linears[0].values.view(np.float32)
        kept = values.copy()
        values[:] = np.nan
        found = Runner(model).forward([5])
        values[:] = kept
        assert np.isnan(found).all() or np.array_equal(found, expected)
        chosen += bool(np.isnan(found).all())
    assert chosen == 2


@pytest.mark.parametrize("biased", [False, True])
def test_the_layout_is_tried_with_chosen_experts(folder: Path, tmp_path: Path, biased: bool) -> None:
    """So that a token reads them all, and no others are in memory; a router's bias is none of theirs."""
    if biased:
        folder = write_family(tmp_path / "m", "gpt_oss", 1, num_experts_per_tok=SIZES["num_experts_per_tok"])
    first = FirstBlock(Source(open_source(folder)))
    facts, arrays = {}, {}
    for name, found, tensors in convert(first, "as stored", ModelLayout.SPARSE, [0]):
        facts[name] = found
        arrays |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    model = settings_of(first, _Arrays(arrays), facts, 16, range(1))
    assert len(mixture_of(model).experts) == SIZES["num_experts_per_tok"]
    runner = Runner(model)
    runner.forward([5])
    assert runner.native.take_bytes_per_token() == runner.native.weight_bytes
    assert Engine(folder, 1).layout in list(ModelLayout)


def mixture_of(model: Model) -> Mixture:
    """The first."""
    return next(layer.mixture for layer in model.layers if layer.mixture is not None)


WRONG: dict[str, Callable[[Mixture], Mixture]] = {
    "experts of a token of 1, at most": lambda m: replace(m, router=replace(m.router, chosen=9)),
    "equal groups of experts": lambda m: replace(m, router=replace(m.router, groups=5)),
    "chosen groups of 1, at most": lambda m: replace(m, router=replace(m.router, chosen_groups=2)),
    "best experts of a group": lambda m: replace(m, router=replace(m.router, group_best=9)),
    "experts of a token, at most": lambda m: replace(m, router=replace(m.router, groups=4, chosen=3)),
    "correction: expected 8 elements": lambda m: replace(m, router=replace(m.router, correction=np.zeros(7, "f4"))),
    "outputs of a linear": lambda m: replace(m, experts=m.experts[:7], router=replace(m.router, correction=None)),
    "expected experts, and a shared one where it has a gate": lambda m: replace(m, shared=None, shared_gate=True),
    "score of a router": lambda m: replace(m, router=replace(m.router, score="tanh")),
    "outputs of a linear: expected 20": lambda m: replace(m, shared=replace(m.experts[0], intermediate=20)),
}  # fmt: skip


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Model:
    sizes = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 0}
    return decoder(write_family(tmp_path_factory.mktemp("grouped") / "m", "glm4_moe", 1, **sizes))


@pytest.mark.parametrize("line", WRONG)
def test_what_does_not_fit_is_refused(line: str, grouped: Model) -> None:
    layers = [replace(layer, mixture=WRONG[line](layer.mixture)) for layer in grouped.layers if layer.mixture]
    with pytest.raises(ValueError, match=line):
        Runner(replace(grouped, layers=layers))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_router_that_gives_no_numbers(grouped: Model, groups: int) -> None:
    """Ends in logits that are none, too, and not beyond the memory."""
    mixture = mixture_of(grouped)
    values = mixture.router.group.linears[0].values.view(np.float32)
    kept = values.copy()
    values[:] = np.nan
    router = replace(mixture.router, groups=groups, chosen_groups=2 if groups > 1 else 1, group_best=2)
    layers = [replace(grouped.layers[0], mixture=replace(mixture, router=router))]
    runner = Runner(replace(grouped, layers=layers))
    assert np.isnan(runner.forward([1, 2, 3])).all() and np.isnan(runner.forward([4], 0, 3)).all()
    values[:] = kept
