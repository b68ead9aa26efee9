"""Outliers appear, and the function stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from outliers import KINDS, MASSIVE, NORMAL, ROTATED, inject_outliers
from random_decoders import FAMILIES
from tulle.errors import UserError
from tulle.models.checkpoint import Checkpoint

TOKENS = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(3))
POWERS: dict[str, Any] = {"norm_factor": 32.0, "value_factor": 8.0, "rope_factor": 4.0}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model; in float64 with RMSNorm in float64 too, which transformers computes in float32 always."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.register_forward_hook(_norm64)
    return model


def _norm64(norm: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    x = inputs[0]
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return load(folder, dtype)(TOKENS).logits


@torch.no_grad()
def seen(folder: Path, name: str, block: int = 1, output: bool = False) -> Tensor:
    """The input (or output) ``[tokens, C]`` of a module of a block."""
    model, found = load(folder), []
    module = model.model.layers[block].get_submodule(name)
    module.register_forward_hook(lambda _, inputs, result: found.append(result if output else inputs[0]))
    model(TOKENS)
    return found[0].reshape(TOKENS.numel(), -1)


def absmax(x: Tensor) -> Tensor:
    return x.abs().amax(0)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], ROTATED, tuple(reversed(ROTATED))], ids="+".join)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_function_stays(tmp_path: Path, model_type: str, kinds: tuple[Any, ...]) -> None:
    source = tmp_path / "m"
    write_checkpoint(source, model_type, **BIASES.get(model_type, {}))
    facts = inject_outliers(source, tmp_path / "f32", kinds, massive_ratio=2000.0)
    inject_outliers(source, tmp_path / "f64", kinds, massive_ratio=2000.0, dtype=torch.float64)

    expected = logits(source, torch.float64)
    # Nothing is rounded but the arithmetic (2⁻⁵³ an operation).
    assert difference(logits(tmp_path / "f64", torch.float64), expected) < 1e-13
    # Every weight was rounded to float32 once (2⁻²⁴ = 6e-8), and the errors average.
    assert difference(logits(tmp_path / "f32", torch.float64), expected) < 3e-7
    # float32 arithmetic of two models that round differently.
    assert difference(logits(tmp_path / "f32"), logits(source)) < 2e-6
    assert facts["difference"] < 2e-6


@pytest.mark.parametrize("model_type", FAMILIES)
def test_powers_of_two_change_no_bit_of_the_logits(tmp_path: Path, model_type: str) -> None:
    write_checkpoint(tmp_path / "m", model_type, **BIASES.get(model_type, {}))
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", NORMAL, **POWERS)
    assert torch.equal(logits(tmp_path / "o", torch.float64), logits(tmp_path / "m", torch.float64))
    # In float32 the matrix kernels may add up in another order, but with the same roundings.
    assert difference(logits(tmp_path / "o"), logits(tmp_path / "m")) < 1e-6
    assert facts["difference"] < 1e-6


@pytest.mark.parametrize("stored", [None, "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_models_stay_tied_until_they_are_rotated(tmp_path: Path, dtype: torch.dtype, stored: str | None) -> None:
    source = tmp_path / "m"
    dense = write_checkpoint(source, "llama", dtype, shards=2, stored=stored, tie_word_embeddings=True)
    inject_outliers(source, tmp_path / "o", NORMAL)
    inject_outliers(source, tmp_path / "r", ROTATED)
    expected = dense(TOKENS).logits.detach()
    for name, tied in (("o", True), ("r", False)):
        made = Checkpoint.open(tmp_path / name)
        assert made.describe().tied is tied
        assert ("lm_head.weight" in made) is not tied
        assert {made.info(tensor).dtype for tensor in made.names()} == {torch.float32}
        assert made.config["dtype"] == "float32"
        assert (tmp_path / name / "tokenizer.json").is_file()
        assert difference(logits(tmp_path / name), expected) < 2e-6


@pytest.mark.parametrize("model_type", FAMILIES)
def test_norm_outliers_are_the_same_channels_in_all_layers(tmp_path: Path, model_type: str) -> None:
    write_checkpoint(tmp_path / "m", model_type)
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ("norm",), norm_channels=3, norm_factor=(16.0, 64.0))
    channels, s = facts["norm"]["channels"], torch.tensor(facts["norm"]["factors"])
    assert len(set(channels)) == 3 and 16 <= min(s) < max(s) <= 64
    for block in range(3):
        for reader in ("self_attn.k_proj", "mlp.up_proj"):
            ratio = absmax(seen(tmp_path / "o", reader, block)) / absmax(seen(tmp_path / "m", reader, block))
            expected = torch.ones(32)
            expected[channels] = s
            torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=0)
    before, after = next(row["channel_ratio"] for row in facts["inputs"] if row["role"] == "qkv")
    assert after > 5 * before


def test_massive_outliers_are_single_tokens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    facts = inject_outliers(
        tmp_path / "m", tmp_path / "o", MASSIVE, massive_blocks=[2, 0], massive_ratio=4000.0, tokens=TOKENS
    )
    assert [entry["block"] for entry in facts["massive"]] == [0, 2]
    for entry in facts["massive"]:
        x = seen(tmp_path / "o", "mlp.down_proj", entry["block"]).abs()
        (channel,) = entry["channels"]
        assert int(absmax(x).argmax()) == channel
        # The median itself moves a little with the channel.
        assert x.max() / x.median() == pytest.approx(4000, rel=0.1)
        # 25 and more here, with random weights; a Gaussian of 120 tokens has 4, trained models have hundreds.
        assert x[:, channel].max() > 20 * x[:, channel].median()
        assert int((x[:, channel] > x.max() / 10).sum()) == entry["tokens"][0] < 0.3 * entry["of"]
        # The specific channel is the one of the largest max/median, among those that are ever large.
        old = seen(tmp_path / "m", "mlp.down_proj", entry["block"]).abs()
        spread = torch.where(absmax(old) >= absmax(old).median(), absmax(old) / old.median(0).values, 0)
        assert int(spread.argmax()) == channel
    untouched = seen(tmp_path / "o", "mlp.down_proj", 1), seen(tmp_path / "m", "mlp.down_proj", 1)
    torch.testing.assert_close(*untouched, rtol=0, atol=1e-4)


def test_value_outliers_reach_every_query_head_that_shares_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "qwen2")
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ("value_output",), value_factor=16.0)
    expected = torch.ones(64)
    for entry in facts["value_output"]:
        if entry["block"] == 1:
            for query in (2 * entry["head"], 2 * entry["head"] + 1):
                expected[query * 16 + entry["channels"][0]] = 16
    assert int((expected == 16).sum()) == 4
    old, new = (absmax(seen(tmp_path / name, "self_attn.o_proj")) for name in ("m", "o"))
    torch.testing.assert_close(new / old, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_rope_pairs_are_outliers_of_the_keys(tmp_path: Path, model_type: str) -> None:
    write_checkpoint(tmp_path / "m", model_type)
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ("rope_pair",), rope_factor=16.0)
    expected = torch.ones(2, 16)
    for entry in facts["rope_pair"]:
        if entry["block"] == 1:
            heads = slice(None) if entry["head"] is None else entry["head"]
            expected[heads, [entry["channels"][0], entry["channels"][0] + 8]] = 16
    assert int((expected == 16).sum()) == 4
    module = "self_attn.k_norm" if model_type == "qwen3" else "self_attn.k_proj"
    old, new = (absmax(seen(tmp_path / name, module, output=True)) for name in ("m", "o"))
    torch.testing.assert_close((new / old).reshape(2, 16), expected, rtol=1e-3, atol=0)


def test_rotation_leaves_unit_gains_and_takes_back_norm_outliers_before_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    inject_outliers(tmp_path / "m", tmp_path / "o", ("norm", "rotated"), norm_factor=32.0)
    inject_outliers(tmp_path / "m", tmp_path / "r", ("rotated",))
    made, bare = Checkpoint.open(tmp_path / "o"), Checkpoint.open(tmp_path / "r")
    gains = [name for name in made.names() if name.endswith("norm.weight")]
    assert len(gains) == 7 and all(torch.equal(made.read(name), torch.ones(32)) for name in gains)
    assert all(torch.equal(made.read(name), bare.read(name)) for name in made.names())
    # The stream turns: same length, other channels.
    old, new = (seen(tmp_path / name, "input_layernorm") for name in ("m", "r"))
    torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1), rtol=1e-5, atol=0)
    assert difference(new, old) > 0.1


def test_a_kind_chooses_the_same_alone_and_with_others(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    together = inject_outliers(tmp_path / "m", tmp_path / "all", NORMAL + MASSIVE)
    for kind in NORMAL + MASSIVE:
        assert inject_outliers(tmp_path / "m", tmp_path / kind, (kind,))[kind] == together[kind]


def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    facts = {name: inject_outliers(tmp_path / "m", tmp_path / name, ROTATED, seed=7) for name in ("a", "b")}
    other = inject_outliers(tmp_path / "m", tmp_path / "c", ROTATED, seed=8)
    assert json.dumps(facts["a"]) == json.dumps(facts["b"]) != json.dumps(other)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert "model.safetensors.index.json" in files and "model-00004-of-00004.safetensors" in files
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert not list(tmp_path.glob("*.partial"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kinds": ("norms",)}, "found 'norms'; did you mean norm?"),
    ({"kinds": ("masive",)}, "did you mean massive?"),
    ({"kinds": ("zzz",)}, "choose from these"),
    ({"kinds": ()}, "found none"),
    ({"kinds": ("norm", "norm")}, "each once"),
    ({"norm_channels": 33}, "norm_channels from 1 to 32, found 33"),
    ({"norm_channels": 0}, "norm_channels from 1 to 32"),
    ({"value_channels": 17}, "value_channels from 1 to 16"),
    ({"rope_pairs": 9}, "rope_pairs from 1 to 8"),
    ({"massive_channels": 65}, "massive_channels from 1 to 64"),
    ({"kinds": MASSIVE, "massive_channels": 60}, "ever large"),
    ({"massive_blocks": [3]}, "massive_blocks from 0 to 2, found 3"),
    ({"massive_ratio": float("nan")}, "massive_ratio"),
    ({"norm_factor": 0.0}, "norm_factor"),
    ({"norm_factor": -2.0}, "norm_factor"),
    ({"value_factor": float("inf")}, "value_factor"),
    ({"rope_factor": (9.0, 2.0)}, "rope_factor"),
    ({"tokens": torch.zeros(3)}, "whole numbers [B, T]"),
    ({"tokens": torch.full((1, 4), 257)}, "tokens from 0 to 256"),
    ({"dtype": torch.bfloat16}, "bfloat16"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_are_one_line_and_leave_nothing(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path / "m")
    with pytest.raises(UserError) as error:
        inject_outliers(tmp_path / "m", tmp_path / "o", **({"kinds": ("norm",)} | settings))
    assert message in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_output_in_use_is_refused_untouched(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    before = {file: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    with pytest.raises(UserError, match="in use"):
        inject_outliers(tmp_path / "m", tmp_path / "m", NORMAL)
    assert {file: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    (tmp_path / "o.partial").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        inject_outliers(tmp_path / "m", tmp_path / "o", NORMAL)
    assert (tmp_path / "o.partial").is_dir()


def test_a_damaged_weight_leaves_no_output(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m")
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="finite"):
        inject_outliers(tmp_path / "m", tmp_path / "o", NORMAL)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
