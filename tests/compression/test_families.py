"""Every family through compressing: what is written computes, in transformers, what the walk computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tulle
from family_folders import write_family
from random_families import DENSE, EXPERTS, HYBRID
from tulle.compression.job import compress
from tulle.errors import UserError
from tulle.hf.packed_decoder import PackedDecoder
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import final_norm
from tulle.models.decoder import logits as decoder_logits
from tulle.text.reading import Text

pytestmark = pytest.mark.usefixtures("no_pages")

TOKENS = torch.tensor(list(b"A fox that is quick jumps over dogs."))[None]
TEXT = Text(("The quick brown fox jumps over the lazy dog. " * 20,), False, ("prose",))
RECIPES: dict[str, list[dict[str, Any]]] = {
    "w4a16": [{"gptq": {"bits": 4, "group_size": "auto-32"}}],
    "sparse50-w4": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": "auto-32"}}],
    "w8a8-smoothquant": [
        {"smoothquant": {}}, {"activations": {"bits": 8}}, {"round_to_nearest": {"bits": 8}},
    ],
    "w4a4-quarot": [
        {"quarot": {}}, {"activations": {"bits": 4}}, {"kv_cache": {"bits": 4}}, {"gptq": {"bits": 4}},
    ],
}  # fmt: skip
FOLDS: dict[str, list[dict[str, Any]]] = {
    "quarot": [{"quarot": {}}],
    "values": [{"quarot": {"residual": False}}],
    "stream": [{"quarot": {"heads": False}}],
    "permuted": [{"permute_channels": {}}],
    "duquant": [{"smoothquant": {"alpha": 0.7}}, {"duquant": {}}],
}
ALL = DENSE + HYBRID + EXPERTS
ROTATION = {"cohere2", "exaone4", "gemma2", "gemma3_text", "gemma4_text", "glm4", "nemotron", "olmo2"}
ROTATION |= {"olmo3", "stablelm", "starcoder2"}
"""Families whose residual stream cannot be rotated."""
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Families whose values come of the vector that gives the keys."""
MIXED = ("bitnet", "gemma4_text", "granitemoehybrid", "lfm2", "nemotron_h", "qwen3_5_text", "qwen3_5_moe_text")
MIXED += ("qwen3_next", *LATENT)
"""Families whose values cannot be rotated: they do not reach o as they are."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_family(tmp_path_factory.mktemp("families") / family, family, 1) for family in ALL}


def refused(fold: str, family: str) -> bool:
    return fold in ("quarot", "stream") and family in ROTATION or fold in ("quarot", "values") and family in MIXED


def run(folder: Path, output: Path, steps: list[dict[str, Any]]) -> dict[str, Any]:
    recipe = {"calibration": {"samples": 2, "length": 24}, "steps": steps}
    report = compress(folder, recipe, output, calibration=TEXT)
    if "activations" not in str(steps):  # a sum in another order moves some of those by a step
        assert report["reload"]["difference"] < 1e-5
    return report


@torch.no_grad()
def logits(folder: Path, packed: bool = True) -> torch.Tensor:
    load = tulle.load if packed else AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("family", ALL)
def test_folds_leave_the_function(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Or they are refused by name."""
    dense = logits(folders[family], packed=False)
    for name, steps in FOLDS.items():
        if name == "values" and family not in ROTATION or name == "stream" and family not in MIXED:
            continue  # part of quarot
        try:
            run(folders[family], tmp_path / name, steps)
        except UserError as error:
            assert "rotat" in str(error) and refused(name, family), error
            continue
        assert not refused(name, family)
        found = logits(tmp_path / name)
        assert float((found - dense).abs().max() / dense.abs().max()) <= 2e-5, name


def require_left_padding(model: Any, alone: torch.Tensor, rounded: bool) -> None:
    """In a batch with a shorter text a text's logits are those ``alone``, and so are the shorter one's; or nearly so
    where inputs are ``rounded``."""
    short = TOKENS[:, 9:]
    batch, valid = TOKENS.repeat(2, 1), torch.ones(2, TOKENS.shape[1], dtype=torch.long)
    batch[1, :9] = valid[1, :9] = 0
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    found = model(batch, attention_mask=valid, position_ids=positions).logits
    for row, wanted in ((found[:1], alone), (found[1:, 9:], model(short).logits)):
        if rounded:  # a sum in another order moves some of them by a step
            assert float((row - wanted).norm() / wanted.norm()) <= 0.02
        else:  # transformers' delta nets begin their chunks elsewhere
            assert float((row - wanted).abs().max() / wanted.abs().max()) <= 3e-5


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ALL)
def test_compressed(folders: dict[str, Path], family: str, recipe: str, tmp_path: Path) -> None:
    """Every linear of every block is in codes; the loaded model is transformers' dense one with the weights of the
    codes, or, with rounded inputs, near it."""
    dense = logits(folders[family], packed=False)
    steps = RECIPES[recipe]
    if recipe == "w4a4-quarot" and refused("quarot", family):
        with pytest.raises(UserError, match="rotat"):
            run(folders[family], tmp_path / "out", steps)
        return
    report = run(folders[family], tmp_path / "out", steps)
    model = tulle.load(tmp_path / "out", dtype=torch.float32)
    found = model(TOKENS).logits
    require_left_padding(model, found, "activations" in str(steps))
    assert all(linear["bits"] in (4, 8) for linear in report["linears"])
    if "activations" in str(steps):
        limit = {"w8a8-smoothquant": 0.2, "w4a4-quarot": 1.2}[recipe]
        # Rounding sends tokens to other experts.
        assert float((found - dense).norm() / dense.norm()) < (1.5 * limit if family in EXPERTS else limit)
        return
    plain = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    packed = 0
    for name, module in tulle.load(tmp_path / "out", dtype=torch.float32).named_modules():
        if hasattr(module, "dequantise"):
            weight_of(plain, name).copy_(module.dequantise())
            packed += 1
    assert packed == len(report["linears"])
    torch.testing.assert_close(found, plain(TOKENS).logits, atol=1e-4, rtol=1e-4)


def weight_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Where transformers' model holds a linear's weight: a part of one parameter for that of an expert."""
    prefix, experts, rest = name.partition(".experts.")
    if not experts:
        return model.get_submodule(name).weight.data
    holder, (number, last) = model.get_submodule(f"{prefix}.experts"), rest.split(".")
    if last in ("down_proj", "w2"):
        found = holder.down_proj.data[int(number)]
        return found.T if model.config.model_type == "gpt_oss" else found
    if not hasattr(holder, "gate_up_proj"):
        return holder.up_proj.data[int(number)]
    both, up = holder.gate_up_proj.data[int(number)], last in ("up_proj", "w3")
    if model.config.model_type == "gpt_oss":
        return both[:, int(up) :: 2].T
    return both.chunk(2)[up]


@pytest.mark.parametrize(
    "family",
    [
        "apertus", "bitnet", "gemma2", "gemma4_text", "nemotron", "phi3",
        "lfm2", "qwen3_next",  # recurrent states
        "deepseek_v3", "gpt_oss", "nemotron_h",  # experts, latent attention, Mamba-2
    ],
)  # fmt: skip
def test_bits_by_cost_and_recovery(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """What looks at the whole model, and what trains it."""
    bits, rate = 7.0 if family == "gpt_oss" else 5.0, 1e-3 if family in (*HYBRID, *EXPERTS) else 1e-2
    recipe = {
        "calibration": {"samples": 2, "length": 24},
        "steps": [{"allocate_bits": {"bits": bits, "group_sizes": ["auto-32"]}}, {"gptq": {}}],
        "recover": {"tokens": 512, "context": 16, "batch": 4, "rate": rate, "warmup_steps": 1},
    }
    report = tulle.compress(folders[family], recipe, tmp_path / "out", calibration=TEXT)
    curve = report["recover"]["curve"]
    assert curve[-1]["held_out_kl"] < curve[0]["held_out_kl"]
    assert report["reload"]["difference"] < 1e-5
    assert len({linear["bits"] for linear in report["linears"]}) > 1


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("qwen3_moe", "tiny"), ("mixtral", "small"), ("gpt_oss", "balanced"), ("deepseek_v2", "small")],
)
def test_shipped_recipes_by_cost_take_experts(family: str, recipe: str, tmp_path: Path) -> None:
    """All experts of a block have one grid for their gates, one for their ups, one for their downs."""
    wide: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    wide |= dict.fromkeys(["intermediate_size"] if family in ("mixtral", "gpt_oss") else ["moe_intermediate_size"], 64)
    model = write_family(tmp_path / "model", family, 2, **wide)
    report = compress(model, recipe, tmp_path / "out", calibration=TEXT, samples=2, length=24)
    assert report["reload"]["difference"] < 1e-5
    grids: dict[str, set[tuple[Any, ...]]] = {}
    for linear in report["linears"]:
        unit = ".".join("*" if part.isdigit() else part for part in linear["name"].split(".")[3:])
        grids.setdefault(f"{linear['block']} {unit}", set()).add((linear["bits"], linear["group_size"]))
    assert any("experts" in unit for unit in grids)
    assert all(len(found) == 1 for found in grids.values())
    budget = {"tiny": 2.97, "small": 4.46, "balanced": 5.6}[recipe]
    weights = report["linears"] + report["tables"]
    bits = 8 * sum(x["packed_bytes"] for x in weights) / sum(x["shape"][0] * x["shape"][1] for x in weights)
    assert 0.8 * budget < bits <= budget


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma4_text", "gpt_oss"])
def test_rounded_caches_with_caps_and_windows(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """transformers computes what the folder means, padded at the left or not."""
    run(folders[family], tmp_path / "out", [{"kv_cache": {"bits": 8}}, {"gptq": {"bits": 4}}])
    model, plain = tulle.load(tmp_path / "out", dtype=torch.float32), PackedDecoder(Checkpoint.open(tmp_path / "out"))
    found, hidden = model(TOKENS).logits, [plain.embed(TOKENS)]
    for index in range(len(plain.decoder.layers)):
        hidden = plain.block(index, hidden, [TOKENS])
    normed = final_norm(plain.decoder, hidden[0], plain.outer())
    wanted = decoder_logits(plain.decoder, normed, plain.head(0, plain.decoder.vocabulary))
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 5e-6 * len(plain.decoder.layers)
    require_left_padding(model, found, rounded=False)
