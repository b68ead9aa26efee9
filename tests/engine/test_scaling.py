"""Scaling Transformers in the engine, against the torch model and against themselves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corruption import damaged, try_model
from numpy.typing import NDArray
from torch import Tensor, nn

from tulle.engine import Engine
from tulle.engine.scaling import quantised
from tulle.errors import UserError
from tulle.models.scaling_transformer import ScalingTransformerConfig, ScalingTransformerForCausalLM
from tulle.models.scaling_transformer.feed_forward import SparseFeedForward, one_hot

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
DENSE: dict[str, Any] = {"ff_block": None, "qkv_modules": None}
BOTH: dict[str, Any] = {"ff_block": 8, "qkv_modules": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "ff": {"ff_block": 8, "qkv_modules": None},
    "qkv": {"ff_block": None, "qkv_modules": 8},
    "both": BOTH,
    "no positions": BOTH | {"position_embedding": "none"},
    "loss layer": BOTH | {"loss_modules": 6, "tie_word_embeddings": False},
    "untied, no biases": BOTH | {"tie_word_embeddings": False, "attention_bias": False},
    # Panels that are not full, blocks that end within one.
    "odd sizes": {
        "hidden_size": 60, "intermediate_size": 108, "num_attention_heads": 6, "ff_block": 12, "ff_lowrank": 7,
        "qkv_modules": 3,
    },
    # More than one part of the inputs, rows longer than a register of codes.
    "wide": {"hidden_size": 640, "intermediate_size": 384, "ff_block": 24, "qkv_modules": 20, "num_attention_heads": 5},
    "dense, wide": DENSE | {"hidden_size": 640, "intermediate_size": 384, "num_attention_heads": 5},
}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], 40).tolist()


def build(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> ScalingTransformerForCausalLM:
    """A random model, saved in ``folder``."""
    torch.manual_seed(0)
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**(SHAPE | settings)))
    for parameter in model.parameters():  # biases of zero would hide mistakes at the edges of sequences
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval().to(dtype).save_pretrained(folder)
    # Not model.float(): the frequencies of RoPE have been rounded as well.
    loaded: ScalingTransformerForCausalLM = ScalingTransformerForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


@torch.inference_mode()
def logits_of(model: nn.Module, ids: list[int] = IDS) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return found


def off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def step_by_step(engine: Engine, ids: list[int] = IDS, prompt: int = 7) -> NDArray[np.float32]:
    found = [engine.forward(ids[:prompt])]
    found += [engine.forward([token], 0, prompt + i) for i, token in enumerate(ids[prompt:])]
    return np.concatenate(found)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_torch_model_in_float32(settings: dict[str, Any], threads: int, tmp_path: Path) -> None:
    expected = logits_of(build(tmp_path, **settings))
    engine = Engine(tmp_path, threads, cache="f32", head="as stored")
    assert off(engine.forward(IDS), expected) < 1e-5
    assert off(step_by_step(engine), expected) < 1e-5
    assert off(step_by_step(engine, prompt=1), expected) < 1e-5


@pytest.mark.parametrize("name", ["dense", "both", "loss layer"])
def test_greedy_tokens(name: str, tmp_path: Path) -> None:
    model = build(tmp_path, **VARIANTS[name])
    with torch.inference_mode():
        wanted = model.generate(torch.tensor([IDS[:5]]), max_new_tokens=30, do_sample=False)[0].tolist()
    # With the head in int8: the largest logits are exact.
    engine, found = Engine(tmp_path, 2), IDS[:5]
    logits = engine.forward(found)[-1]
    while len(found) < len(wanted):
        found.append(int(logits.argmax()))
        logits = engine.forward(found[-1:], 0, len(found) - 1)[0]
    assert found == wanted


@pytest.mark.parametrize("name", ["dense", "both", "loss layer", "odd sizes"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Stored as bfloat16, or rounded to it here: then vectors and the embedding (a tied head) stay as stored."""
    expected = logits_of(build(tmp_path / "b", torch.bfloat16, **VARIANTS[name]))
    assert off(Engine(tmp_path / "b", 2, cache="f32", head="as stored").forward(IDS), expected) < 1e-5
    model = build(tmp_path / "f", **VARIANTS[name])
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter is not model.model.embed_tokens.weight:
            parameter.data = parameter.data.bfloat16().float()
    found = Engine(tmp_path / "f", 2, cache="f32", head="as stored", weights="bf16").forward(IDS)
    assert off(found, logits_of(model)) < 1e-5


def rounded(x: Tensor) -> Tensor:
    """To 8 bits, a step per token."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / step).clamp(-127, 127) * step


def as_int8(model: ScalingTransformerForCausalLM) -> None:
    """What the engine's int8 computes, in torch: linears, W₁, W₂ in codes with rounded inputs, the rest in bfloat16."""

    def codes(weight: Tensor) -> Tensor:
        whole, scales = quantised(weight.detach().numpy(), "")
        return torch.from_numpy((whole.astype(np.float32) - 128) * scales[:, None])

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            wide = "proj" in name or name.endswith(("mlp.w1", "mlp.w2", "mlp.w1.weight", "mlp.w2.weight"))
            parameter.data = codes(parameter) if wide else parameter.data.bfloat16().float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("proj" in name or name.endswith(("mlp.w1", "mlp.w2"))):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        if isinstance(module, SparseFeedForward):
            module.register_forward_hook(_sparse_int8)


def _sparse_int8(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    assert isinstance(module, SparseFeedForward)
    logits = module.controller(inputs[0])
    mask = one_hot(logits.argmax(-1), logits).flatten(-2)
    return ((rounded(inputs[0]) @ module.w1.T).relu() * mask) @ module.w2 + module.b2


@pytest.mark.parametrize("name", ["dense", "ff", "qkv", "both", "wide", "dense, wide"])
def test_int8(name: str, tmp_path: Path) -> None:
    model = build(tmp_path, **VARIANTS[name])
    engine = Engine(tmp_path, 2, cache="f32", head="as stored", weights="int8")
    plain = logits_of(model)
    as_int8(model)
    expected = logits_of(model)
    for found in (engine.forward(IDS), step_by_step(engine)):
        # A sum that differs in its last bit is now and then rounded the other way, by one step of 127.
        errors = np.abs(found - expected).max(1) / np.abs(expected).max()
        assert np.median(errors) < 1e-5 and errors.max() < 1e-2
    assert off(plain, expected) > 2e-3


def test_the_largest_logits_come_from_the_head_as_stored(tmp_path: Path) -> None:
    build(tmp_path, vocab_size=300, **BOTH)
    exact, rough = (Engine(tmp_path, 2, cache="f32", head=head).forward(IDS) for head in ("as stored", "int8"))
    largest = np.argsort(-exact, axis=1)[:, :32]
    near = np.take_along_axis(exact - rough, largest, 1)
    assert np.abs(near).max() < 1e-5 * np.abs(exact).max()
    assert 1e-4 < off(rough, exact) < 3e-2


def test_chosen_units_alone_are_read(tmp_path: Path) -> None:
    """All others are so large that sums with them are not finite."""
    model = build(tmp_path, **BOTH)
    expected = logits_of(model, IDS[:1])
    chosen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, SparseFeedForward):
            module.controller.register_forward_hook(lambda _, __, logits: chosen.append(logits.argmax(-1).flatten()))
    logits_of(model, IDS[:1])
    for layer, choice in zip(model.model.layers, chosen, strict=True):
        kept = choice + torch.arange(len(choice)) * BOTH["ff_block"]
        for weight in (layer.mlp.w1, layer.mlp.w2):
            rows = weight.data[kept]
            weight.data.fill_(3e38)
            weight.data[kept] = rows
    model.save_pretrained(tmp_path)
    engine = Engine(tmp_path, 2, head="as stored")
    assert off(engine.forward(IDS[:1]), expected) < 1e-5
    units = SHAPE["num_hidden_layers"] * SHAPE["intermediate_size"] // BOTH["ff_block"]
    native = engine._native
    assert native.units_read + native.units_skipped == units  # type: ignore[union-attr]
    row = 4 * SHAPE["hidden_size"]
    assert engine.take_bytes_per_token() == engine.weight_bytes - native.units_skipped * row  # type: ignore[union-attr]
    assert engine.take_bytes_per_token() == 0


@pytest.mark.parametrize("name", ["dense", "both"])
def test_sequences_do_not_meet(name: str, tmp_path: Path) -> None:
    build(tmp_path, **VARIANTS[name])
    engine = Engine(tmp_path, 2, sequences=3, cache="f32", head="as stored")
    others = [IDS, IDS[::-1], IDS[5:] + IDS[:5]]
    alone = [engine.forward(ids).copy() for ids in others]
    order = [(slot, i) for i in range(len(IDS)) for slot in (2, 0, 1)]
    for size in (len(order), 3, 50):  # in one pass, a token of each at a time, and across the borders of passes
        mixed = np.concatenate([
            engine.forward([others[s][i] for s, i in part], [s for s, _ in part], [i for _, i in part])
            for part in (order[at : at + size] for at in range(0, len(order), size))
        ])  # fmt: skip
        for column, slot in enumerate((2, 0, 1)):
            assert off(mixed[column::3], alone[slot]) < 1e-5


def test_caches(tmp_path: Path) -> None:
    expected = logits_of(build(tmp_path, **BOTH))
    kinds = ("f32", "bf16", "int8")
    found = {k: off(Engine(tmp_path, 1, cache=k, head="as stored").forward(IDS), expected) for k in kinds}
    assert found["f32"] < 1e-5 < found["bf16"] < 0.1
    assert found["int8"] < 0.3  # a choice that is nearly a tie may fall the other way


def test_convolutions_go_on_where_they_were(tmp_path: Path) -> None:
    build(tmp_path, **BOTH)
    engine = Engine(tmp_path, 2, cache="f32", head="as stored")
    expected = step_by_step(engine)
    for position in (3, len(IDS) - 1, len(IDS) + 1):
        with pytest.raises(UserError, match=f"expected {len(IDS)} or a start at 0, found {position}"):
            engine.forward([1], 0, position)
    with pytest.raises(UserError, match="expected 2 or a start"):
        engine.forward([1, 2, 3], 0, [0, 1, 3])
    # What was refused has left no trace.
    assert off(engine.forward([7], 0, len(IDS)), Engine(tmp_path, 1, head="as stored").forward([*IDS, 7])[-1:]) < 1e-5
    assert np.array_equal(step_by_step(engine), expected)
    # A dense one may go back.
    build(tmp_path / "dense", **DENSE)
    dense = Engine(tmp_path / "dense", 2, cache="f32", head="as stored")
    with pytest.raises(UserError, match="expected at most 0, up to where its past was given, found 9"):
        dense.forward([IDS[9]], 0, 9)
    dense.forward(IDS)
    assert off(dense.forward([IDS[9]], 0, 9), dense.forward(IDS)[9:10]) < 1e-5


def test_instruction_sets_agree_and_torch_stays_out(tmp_path: Path) -> None:
    from tulle.native import supported_isas

    build(tmp_path / "m", **VARIANTS["wide"])
    code = (
        "import sys, numpy as np; from tulle.engine import Engine\n"
        "found = [Engine(sys.argv[1], 1, cache='f32', weights=w).forward(list(range(30))) for w in ('f32', 'int8')]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "np.save(sys.argv[2], found)"
    )
    found = []
    for isa in supported_isas():
        environment = os.environ | {"TULLE_ISA": isa}
        arguments = [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / f"{isa}.npy")]
        subprocess.run(arguments, check=True, env=environment)
        found.append(np.load(tmp_path / f"{isa}.npy"))
    for other in found[1:]:
        assert off(other[0], found[0][0]) < 1e-5
        assert off(other[1], found[0][1]) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_hidden_layers=3), "layers.2"),
        (lambda c: c.update(hidden_size=64), "shape"),
        (lambda c: c.update(hidden_size=10**9), "from 1 to"),
        (lambda c: c.update(hidden_size="32"), "from 1 to"),
        (lambda c: c.update(vocab_size=True), "from 1 to"),
        (lambda c: c.update(num_attention_heads=3), "multiple of 3"),
        (lambda c: c.update(num_attention_heads=32), "even head size"),
        (lambda c: c.update(ff_block=None), "mlp.w1.weight"),
        (lambda c: c.update(ff_block=7), "multiple of 7"),
        (lambda c: c.update(ff_lowrank=5), "shape"),
        (lambda c: c.update(qkv_modules=None), "q_proj"),
        (lambda c: c.update(qkv_modules=8), "shape"),
        (lambda c: c.update(loss_modules=4), "lm_head.d"),
        (lambda c: c.update(position_embedding="alibi"), "rope or none"),
        (lambda c: c.update(rope_parameters=3), "rope_parameters"),
        (lambda c: c.update(rope_parameters={"rope_type": "yarn"}), "rope_parameters"),
        (lambda c: c.update(rms_norm_eps="small"), "rms_norm_eps"),
        (lambda c: c.update(quantization_config={"quant_method": "tulle"}), "--weights int8"),
    ],
)
def test_configurations(change: Any, message: str, tmp_path: Path) -> None:
    build(tmp_path, **BOTH)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    assert message in try_model(tmp_path)


def test_random_damage(tmp_path: Path) -> None:
    build(tmp_path / "model", **BOTH)
    choice, seen = random.Random(0), set()
    for _ in range(60):
        damaged(tmp_path / "model", tmp_path / "damaged", choice)
        seen.add(try_model(tmp_path / "damaged") == "ran")
    assert seen == {True, False}


def test_bad_settings(tmp_path: Path) -> None:
    from checkpoints import write_checkpoint

    model = build(tmp_path / "m", **BOTH)
    for settings, message in (
        ({"weights": "int4"}, "expected weights"),
        ({"head": "int3"}, "expected a head"),
        ({"layout": "row"}, "expected a layout"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(tmp_path / "m", 1, **settings)  # type: ignore[arg-type]
    write_checkpoint(tmp_path / "llama")
    with pytest.raises(UserError, match="no Scaling Transformer"):
        Engine(tmp_path / "llama", 1, weights="int8")
    model.model.layers[1].mlp.w1.data[3, 4] = float("inf")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"expected finite weights, found 1 NaN or Inf in model.layers.1.mlp.w1"):
        Engine(tmp_path / "m", 1, weights="int8")
