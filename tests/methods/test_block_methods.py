"""Contract of the methods that act on blocks and models: without a quantiser, the compressed model is the dense one.

One list drives the tests; ``tests/test_methods.py`` checks that it is complete.
"""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from random_decoders import FAMILIES
from tulle.compression.job import compress
from tulle.compression.recipe import METHODS as NAMES
from tulle.compression.recipe import parse_recipe
from tulle.errors import UserError
from tulle.format.spec import QuantizationConfig
from tulle.methods.activation.budget import ActivationBudget
from tulle.methods.activation.larosa import LaRoSA
from tulle.methods.activation.thresholds import TEAL
from tulle.methods.activation.wina import WINA
from tulle.methods.contract import Method
from tulle.methods.prune.allocate import Allocate
from tulle.methods.prune.owl import OWL
from tulle.methods.prune.permute_channels import PermuteChannels
from tulle.methods.prune.reconstruct import Reconstruct
from tulle.methods.quantize.activations import Activations
from tulle.methods.quantize.affinequant import AffineQuant
from tulle.methods.quantize.allocate_bits import AllocateBits
from tulle.methods.quantize.duquant import DuQuant
from tulle.methods.quantize.flatquant import FlatQuant
from tulle.methods.quantize.keep_sensitive import KeepSensitive
from tulle.methods.quantize.kv_cache import KVCache
from tulle.methods.quantize.learned_clipping import LearnedClipping
from tulle.methods.quantize.perq import PeRQ
from tulle.methods.quantize.quarot import QuaRot
from tulle.methods.quantize.smoothquant import SmoothQuant
from tulle.methods.quantize.spinquant import SpinQuant
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))

TRANSFORMS: list[Method] = [
    SmoothQuant(),
    SmoothQuant(alpha=0.9),
    SmoothQuant(size="rms"),
    QuaRot(),
    QuaRot(residual=False, across_heads=False),
    DuQuant(steps=4, block=16),
    DuQuant(steps=2, block=128, choose="row_index"),
    DuQuant(steps=2, block=4, permutation="random", permutations=2),
    DuQuant(block=8, rotation="hadamard", permutation="none"),
    PeRQ(block=8),
    PeRQ(block=0),
    PeRQ(block=16, rotation="greedy", steps=3, gather=False),
    FlatQuant(epochs=1),
    FlatQuant(epochs=0, start="max"),
    AffineQuant(epochs=2, block=16),
    SpinQuant(steps=3),
    LaRoSA(),
    LaRoSA(residual=False),
    PermuteChannels(effort=0.01),
    PermuteChannels(pattern="4:8", score="magnitude", power=1, residual=False, effort=0.01),
]
"""Change the basis in which things are computed, and nothing else."""
OTHERS: list[Method] = [
    AllocateBits(bits=4.0),
    Activations(bits=4, clip=0.9),
    KVCache(bits=4, query_bits=8),
    LearnedClipping(epochs=1),
    LearnedClipping(epochs=1, inputs=True, scales=True),
    KeepSensitive(count=2),
    OWL(sparsity=0.5),
    Allocate(sparsity=0.5, tokens=40),
    Allocate(sparsity=0.6, budget="bytes", bits=4, per="role", lowest=0.3, highest=0.9, tokens=40),
    Reconstruct(epochs=1),
    TEAL(share=0.4),
    TEAL(share=0.5, kind="top_k", block=16, unit=4, rescale=True),
    WINA(share=0.6),
    ActivationBudget(share=0.5, tokens=40),
]


def step(method: Method, **targets: Any) -> dict[str, Any]:
    name = next(n for n, path in NAMES.items() if path.endswith(":" + type(method).__name__))
    return {name: asdict(method) | targets}  # type: ignore[call-overload]


def recipe_with(method: Method) -> list[dict[str, Any]]:
    """Its step and one that rounds weights, in the order of their stages."""
    weights = {"round_to_nearest": {"bits": 4, "symmetric": False}}
    pruning = [{"wanda": {"sparsity": 0.5}}] if "sparsities" in method.settles else []
    pruning += [{"teal": {"share": 0.5}}] if "input sparsities" in method.settles else []
    return [weights, step(method)] if method.stages == ("refine",) else [step(method), *pruning, weights]


def run(folder: Path, output: Path, steps: list[dict[str, Any]], target: str = "layer", seed: int = 0) -> Any:
    recipe = {"steps": steps, "calibration": {"samples": 4, "length": 40, "target": target}}
    return compress(folder, recipe, output, calibration=TEXT, seed=seed)


def prose() -> torch.Tensor:
    data = list(PROSE.encode())
    return torch.tensor([data[:50], data[300:350], data[1000:1050]])


@torch.no_grad()
def assert_same_function(folder: Path, dense: torch.nn.Module, tolerance: float = 1e-5) -> None:
    model = tulle.hf.load(folder, dtype=torch.float32)
    expected = dense(prose()).logits
    assert (model(prose()).logits - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", TRANSFORMS, ids=str)
def test_function_is_preserved(method: Method, model_type: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if model_type in ("llama", "qwen3") else {}
    biased = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    dense = write_checkpoint(tmp_path / "m", model_type, **tied, **biased, num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", [step(method)])
    assert_same_function(tmp_path / "out", dense)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("method", [QuaRot(), DuQuant(steps=4), PeRQ(block=32)], ids=str)
def test_wide_heads(method: Method, head_dim: int, tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", head_dim=head_dim, num_hidden_layers=1)
    run(tmp_path / "m", tmp_path / "out", [step(method), step(KVCache(bits=8, query_bits=8))])
    # 8 bits per head: the Hadamard over head_dim is undone exactly. Rounding is left, 1/127 of each head's largest
    # number for queries, keys and values: 0.9 to 1.5 % of the largest logit, where 6 bits would be 4 times that.
    assert_same_function(tmp_path / "out", dense, 0.03)
    run(tmp_path / "m", tmp_path / "plain", [step(method)])
    assert_same_function(tmp_path / "plain", dense)


def test_learned_scales_stand_in_front_of_a_rotation(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    steps = [step(DuQuant(steps=2, block=16)), step(LearnedClipping(epochs=3, scales=True, scale_rate=0.05))]
    run(tmp_path / "m", tmp_path / "out", steps)
    assert_same_function(tmp_path / "out", dense)
    # They have been learned: the norm's gain is another.
    stored = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    gain = dense.model.layers[0].input_layernorm.weight
    assert (stored["model.layers.0.input_layernorm.weight"] - gain).abs().max() > 0.01


def test_widths_that_are_no_powers_of_two(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 88, "num_attention_heads": 3, "num_key_value_heads": 3}
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=1, **sizes)
    for number, method in enumerate([QuaRot(), DuQuant(steps=2), PeRQ(), FlatQuant(epochs=0), AffineQuant(epochs=0)]):
        run(tmp_path / "m", tmp_path / str(number), [step(method)])
        assert_same_function(tmp_path / str(number), dense)


@pytest.mark.parametrize("method", [*TRANSFORMS, *OTHERS], ids=str)
class TestContract:
    def test_settings_are_frozen(self, method: Method) -> None:
        with pytest.raises(FrozenInstanceError):
            setattr(method, fields(method)[0].name, 1)  # type: ignore[arg-type]

    def test_the_recipe_reads_it_back(self, method: Method) -> None:
        steps = recipe_with(method)
        read = parse_recipe({"steps": steps}).steps[steps.index(step(method))]
        assert read.method == method and method.stages[0] in ("model", "block", "refine")

    def test_two_runs_write_the_same_bytes(self, method: Method, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "m", num_hidden_layers=2)
        for name in ("a", "b"):
            run(tmp_path / "m", tmp_path / name, recipe_with(method), seed=3)
        for file in sorted((tmp_path / "a").glob("*.safetensors")):
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_siblings_share_one_transform(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    run(tmp_path / "m", tmp_path / "out", [step(DuQuant(steps=2, block=16))])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    linears = QuantizationConfig.from_json(config).linears
    holders = {name.rsplit(".", 1)[-1]: spec.transform_of for name, spec in linears.items()}
    prefix = "model.layers.0."
    assert holders == {
        "q_proj": None, "k_proj": f"{prefix}self_attn.q_proj", "v_proj": f"{prefix}self_attn.q_proj", "o_proj": None,
        "gate_proj": None, "up_proj": f"{prefix}mlp.gate_proj", "down_proj": None,
    }  # fmt: skip
    stored = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert f"{prefix}self_attn.q_proj.transform.0.matrix" in stored
    assert not any("k_proj.transform" in name or "up_proj.transform" in name for name in stored)


@torch.no_grad()
def test_saved_again_is_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    steps = [step(SmoothQuant()), step(DuQuant(steps=2, block=16)), step(Activations()), step(KVCache())]
    run(tmp_path / "m", tmp_path / "out", [*steps, {"round_to_nearest": {"bits": 4}}])
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = tulle.hf.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(prose()).logits, model(prose()).logits)


@torch.no_grad()
def test_cache_decodes_what_the_whole_sequence_gives(tmp_path: Path) -> None:
    """Keys and values are rounded token by token, so a cache changes nothing."""
    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    run(tmp_path / "m", tmp_path / "out", [step(QuaRot()), step(Activations()), step(KVCache(query_bits=4)), RTN])
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    whole = model(prose()).logits
    begun = model(prose()[:, :30], use_cache=True)
    found = [begun.logits]
    cache = begun.past_key_values
    for i in range(30, 50):
        out = model(prose()[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    # A value on the edge between two codes may fall to the other one when sums run in another order.
    close = (torch.cat(found, 1) - whole).abs().amax(-1) < 1e-4 * whole.abs().max()
    assert close.float().mean() > 0.9


RTN: dict[str, Any] = {"round_to_nearest": {"bits": 4, "symmetric": False}}


@torch.no_grad()
@pytest.mark.parametrize("target", ["layer", "dense", "stream"])
def test_the_walker_sees_what_the_artefact_computes(target: str, tmp_path: Path) -> None:
    """The reported error of the last block is that of the loaded model's hidden states."""
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    steps = [step(SmoothQuant()), step(PeRQ(block=16)), step(Activations(bits=6)), step(KVCache(bits=6))]
    report = run(tmp_path / "m", tmp_path / "out", [*steps, {"gptq": {"bits": 6}}], target)
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    from tulle.text.reading import sequences

    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(tmp_path / "m")
    lost = total = 0.0
    for tokens in sequences(TEXT, tokenizer, 40, 4, 0):
        # Hidden states before the final norm.
        found, wanted = (_last_hidden(m, tokens[None]) for m in (model, dense))
        lost += float((found - wanted).square().sum())
        total += float(wanted.square().sum())
    # The same sums but for their order (3e-6). A number between two codes may round the other way on another machine.
    assert report["blocks"][-1]["output_error"] == pytest.approx(lost / total, rel=5e-3)


def _last_hidden(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(tokens)
    handle.remove()
    return seen[0]


def test_order_of_stages_is_checked() -> None:
    with pytest.raises(UserError, match="smoothquant after gptq; put smoothquant before it"):
        parse_recipe({"steps": [{"gptq": {}}, {"smoothquant": {}}]})
    with pytest.raises(UserError, match="quarot after activations"):
        parse_recipe({"steps": [{"activations": {}}, {"quarot": {}}]})


def test_smoothing_behind_a_rotation_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    with pytest.raises(UserError, match="before a transform of qkv's input"):
        run(tmp_path / "m", tmp_path / "out", [step(DuQuant(steps=2)), step(SmoothQuant())])


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Activations, {"bits": 1}, "2 to 8 bits"),
        (Activations, {"clip": 0.0}, "clip above 0"),
        (KVCache, {"bits": 12}, "2 to 8 bits"),
        (SmoothQuant, {"alpha": 1.5}, "alpha from 0 to 1"),
        (DuQuant, {"block": 48}, "block of 2, 4, 8"),
        (DuQuant, {"steps": 0}, "steps of 1 or more"),
        (PeRQ, {"block": 3}, "block of 2, 4, 8"),
        (KeepSensitive, {"keep_bits": 12}, "keep_bits of 2 to 8"),
        (KeepSensitive, {"count": -1}, "count of 0 or more"),
        (SpinQuant, {"rate": 0.0}, "positive rate"),
        (AffineQuant, {"block": 0}, "positive block"),
        (LearnedClipping, {"bits": 9}, "2 to 8 bits"),
        (FlatQuant, {"group_size": 0}, "positive group_size"),
    ],
)  # fmt: skip
def test_impossible_settings(cls: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls(**settings)
