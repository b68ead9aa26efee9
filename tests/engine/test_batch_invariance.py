"""A token's logits are the same bits alone, among others and in any cut of its prompt, for one number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_engines import Runner, decoder, scaling_transformer

from family_folders import write_family
from tiny_models import write_model
from tulle._native import active_isa
from tulle.engine.layout import ModelLayout
from tulle.engine.native_model import Group, Layer, Model, ScalingModel
from tulle.format.spec import InputSparsitySpec
from tulle.models.scaling_transformer import ScalingTransformerConfig, ScalingTransformerForCausalLM
from tulle.native import supported_isas

IDS = np.random.default_rng(0).integers(0, 48, 45).tolist()
HALF = InputSparsitySpec(kind="top_k", keep=32)
UNITS = InputSparsitySpec(kind="top_k", keep=16, block=32, unit=4)
MODELS: dict[str, tuple[dict[str, Any], ModelLayout, int]] = {
    "f32": ({}, ModelLayout.SPARSE, 16),
    "sparse bf16": ({"sparse": True, "values_dtype": "bfloat16"}, ModelLayout.SPARSE, 16),
    "int4, 16-bit inputs": ({"bits": 4, "group_size": 32}, ModelLayout.SPARSE, 16),
    "int4 with minima": ({"bits": 4, "group_size": 32, "symmetric": False}, ModelLayout.SPARSE, 8),
    "sparse int8": ({"bits": 8, "sparse": True}, ModelLayout.SPARSE, 8),
    "w4a4": ({"bits": 4, "input_bits": 4, "input_symmetric": False}, ModelLayout.DENSE, 16),
    "input-major int2": ({"bits": 2, "group_size": 64, "input_sparsity": HALF}, ModelLayout.INPUT_MAJOR, 16),
    "input-major sparse int4": (
        {"bits": 4, "group_size": 64, "sparse": True, "input_sparsity": HALF}, ModelLayout.INPUT_MAJOR, 16
    ),
    "input-major int8 in blocks": (
        {"bits": 8, "group_size": 64, "input_sparsity": UNITS}, ModelLayout.INPUT_MAJOR, 8
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> Model:
    scheme, layout, bits = MODELS[name]
    # Inputs of down fill several chunks (kChunkInputs).
    write_model(folder, {"all": scheme} if scheme else {}, intermediate_size=1088, num_hidden_layers=1)
    model = decoder(folder, layout, bits)
    if name != "int4 with minima":
        return model

    def with_minima(group: Group) -> Group:
        return replace(group, linears=[replace(one, minima=one.scales) for one in group.linears])

    def changed(one: Layer) -> Layer:
        inner = one.feed_forward
        assert inner is not None
        inner = replace(inner, gate_up=with_minima(inner.gate_up), down=with_minima(inner.down))
        return replace(one, feed_forward=inner)

    return replace(model, layers=[changed(one) for one in model.layers])


def differing(model: Model | ScalingModel, threads: int, **more: Any) -> list[str]:
    """The ways of running IDS whose logits are other bits than those of one token at a time."""
    alone = Runner(model, threads=threads, **more)
    one = np.concatenate([alone.forward([token], 0, at) for at, token in enumerate(IDS)])
    found = []
    for sizes in ([45], [2], [3, 5, 6], [13, 17]):
        engine, at, parts = Runner(model, threads=threads, **more), 0, []
        while at < len(IDS):
            parts.append(engine.forward(IDS[at : at + sizes[len(parts) % len(sizes)]], 0, at))
            at += len(parts[-1])
        if not np.array_equal(np.concatenate(parts), one):
            found.append(f"in parts of {sizes}")
    # Among others, at any place.
    engine, others = Runner(model, threads=threads, slots=4, pages=16, **more), [IDS[::-1], IDS[5:] + IDS[:5]]
    for at in range(0, 45, 3):
        rows = [(0, i) for i in range(at, at + 3)] + [(s, i) for s in (1, 2) for i in range(at, at + 3)]
        rows = rows[at % 9 :] + rows[: at % 9]
        tokens = [IDS[i] if s == 0 else others[s - 1][i] for s, i in rows]
        logits = engine.forward(tokens, [s for s, _ in rows], [i for _, i in rows])
        if not np.array_equal(logits[[rows.index((0, i)) for i in range(at, at + 3)]], one[at : at + 3]):
            found.append(f"among others at {at}")
    return found


@pytest.mark.parametrize(
    ("name", "threads"), [*((name, 1) for name in MODELS), ("f32", 2), ("int4 with minima", 2), ("input-major int2", 2)]
)
def test_decoders(name: str, threads: int, tmp_path: Path) -> None:
    assert differing(make(tmp_path / "m", name), threads) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_gated_delta_nets(threads: int, tmp_path: Path) -> None:
    model = decoder(write_family(tmp_path / "m", "qwen3_5_text", 2))
    assert model.state_bytes > 0 and differing(model, threads) == []


@pytest.mark.parametrize(("family", "threads"), [("qwen2_moe", 1), ("qwen2_moe", 2), ("nemotron_h", 2)])
def test_experts(family: str, threads: int, tmp_path: Path) -> None:
    model = decoder(write_family(tmp_path / "m", family, 2))
    assert any(layer.mixture is not None for layer in model.layers) and differing(model, threads) == []


@pytest.mark.parametrize("isa", supported_isas()[1:])  # plain loops over tokens are what they are
def test_instruction_sets(isa: str, tmp_path: Path) -> None:
    if isa == active_isa():
        pytest.skip("it is what the others run on")
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; import test_batch_invariance as of\n"
        "for name in ('f32', 'sparse bf16', 'int4 with minima', 'input-major sparse int4'):\n"
        "    found = of.differing(of.make(Path(sys.argv[1]) / name.replace(' ', '-'), name), 1)\n"
        "    assert not found, (name, found)"
    )
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", code, str(tmp_path), str(here), str(here.parent)]
    subprocess.run(arguments, check=True, env=os.environ | {"TULLE_ISA": isa})


def scaling(folder: Path, weights: str, **settings: Any) -> ScalingModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    ScalingTransformerForCausalLM(ScalingTransformerConfig(**(sizes | settings))).save_pretrained(folder)
    return scaling_transformer(folder, weights)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("settings", [{"ff_block": None, "qkv_modules": None}, {"ff_block": 12, "qkv_modules": 8}])
@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_scaling_transformers(weights: str, settings: dict[str, Any], threads: int, tmp_path: Path) -> None:
    """Those without ``deterministic`` are the same where no matrix is of floats; here the head is."""
    model = scaling(tmp_path, weights, **settings)
    assert differing(model, threads, deterministic=True) == []
