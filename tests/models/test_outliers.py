"""Injected outliers: the same function, and outliers where they were put."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import PROSE, write_checkpoint
from tulle.errors import UserError
from tulle.models.anatomy import ARCHITECTURES
from tulle.models.outliers import KINDS, MASSIVE, NORMAL, ROTATED, inject_outliers

POWERS: dict[str, Any] = {"norm_factor": 32.0, "value_factor": 8.0, "rope_factor": 8.0}
"""Powers of two change no mantissa."""


def prose() -> torch.Tensor:
    data = list(PROSE.encode())
    return torch.tensor([data[:60], data[500:560], data[900:960]])


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(prose()).logits


def inputs_of(folder: Path, module: str) -> torch.Tensor:
    """``[T, C]`` of a linear of block 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    model.model.layers[1].get_submodule(module).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(prose())
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("kinds", [*[(k,) for k in KINDS], NORMAL, ROTATED], ids="-".join)
def test_function_is_unchanged(kinds: tuple[str, ...], model_type: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if model_type in ("llama", "qwen3") else {}
    write_checkpoint(tmp_path / "m", model_type, **tied)
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", kinds, tokens=prose(), **POWERS)  # type: ignore[arg-type]
    assert facts["difference"] < 1e-5
    before, after = (logits(tmp_path / name, torch.float64) for name in ("m", "o"))
    # Powers of two are exact up to float64's own rounding; a massive factor and a rotation round the float32 weights.
    exact = not {"massive", "rotated"} & set(kinds)
    assert (after - before).abs().max() < (1e-11 if exact else 1e-6) * before.abs().max()
    single = (logits(tmp_path / "o", torch.float32) - before).abs().max()
    assert single < 1e-5 * before.abs().max()


def test_norm_outliers_are_normal(tmp_path: Path) -> None:
    """The same channels in every layer, for every token."""
    write_checkpoint(tmp_path / "m")
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ["norm"], norm_channels=2, norm_factor=64.0)
    channels = facts["norm"]["channels"]
    for module in ("self_attn.q_proj", "mlp.up_proj"):
        ratio = inputs_of(tmp_path / "o", module) / inputs_of(tmp_path / "m", module)
        expected = torch.ones(32)
        expected[channels] = 64.0
        torch.testing.assert_close(ratio, expected.expand_as(ratio), rtol=1e-3, atol=1e-3)


def test_massive_outliers_are_of_few_tokens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    facts = inject_outliers(
        tmp_path / "m", tmp_path / "o", MASSIVE, massive_blocks=[1], massive_ratio=2000.0, tokens=prose()
    )
    (found,) = facts["massive"]
    x = inputs_of(tmp_path / "o", "mlp.down_proj").abs()
    (channel,) = found["channels"]
    assert x.amax(0).argmax() == channel
    before = inputs_of(tmp_path / "m", "mlp.down_proj").abs()
    assert float(x.max() / before.median()) == pytest.approx(2000, rel=1e-2)
    carried = x[:, channel] > x.max() / 10
    assert int(carried.sum()) == found["tokens"][0] < len(x) / 2


def test_value_and_rope_outliers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    facts = inject_outliers(tmp_path / "m", tmp_path / "o", ["value_output", "rope_pair"], **POWERS)
    x, before = (inputs_of(tmp_path / name, "self_attn.o_proj") for name in ("o", "m"))
    ratio = (x / before).reshape(-1, 2, 2, 16)
    for entry in facts["value_output"][2:4]:  # of block 1
        (channel,) = entry["channels"]
        torch.testing.assert_close(ratio[:, entry["head"], :, channel], torch.full((180, 2), 8.0), rtol=1e-3, atol=1e-3)
    for entry in facts["rope_pair"]:
        assert entry["factors"] == [8.0] and 0 <= entry["channels"][0] < 8


def test_equal_seeds_equal_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        inject_outliers(tmp_path / "m", tmp_path / name, ROTATED, seed=seed)

    def contents(name: str) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in sorted((tmp_path / name).iterdir())}

    assert contents("a") == contents("b") != contents("c")
    assert "tokenizer.json" in contents("a")
    assert json.loads(contents("a")["config.json"])["dtype"] == "float32"


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        (["masive"], {}, "did you mean massive"),
        ([], {}, "one or more kinds"),
        (["norm", "norm"], {}, "each once"),
        (["norm"], {"norm_channels": 33}, "norm_channels from 1 to 32, found 33"),
        (["norm"], {"norm_factor": float("nan")}, "norm_factor as a finite number"),
        (["norm"], {"norm_factor": (8.0, 2.0)}, "norm_factor as a finite number"),
        (["massive"], {"massive_blocks": [7]}, "massive_blocks from 0 to 2, found 7"),
        (["massive"], {"massive_ratio": -1.0}, "massive_ratio"),
        (["rope_pair"], {"rope_pairs": 9}, "rope_pairs from 1 to 8"),
        (["norm"], {"dtype": torch.bfloat16}, "fewer bits change the function"),
        (["norm"], {"tokens": torch.tensor([[999]])}, "tokens from 0 to 256, found 999"),
    ],
)
def test_bad_settings(kinds: list[str], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        inject_outliers(tmp_path / "m", tmp_path / "o", kinds, **settings)  # type: ignore[arg-type]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m"]


def test_an_output_in_use(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").touch()
    with pytest.raises(UserError, match="new or empty output folder"):
        inject_outliers(tmp_path / "m", tmp_path / "o", ["norm"])
    assert [f.name for f in (tmp_path / "o").iterdir()] == ["thesis.tex"]
