"""Checkpoints that also see: the text part is read, compressed and run as the text model that it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Gemma3Config, Mistral3Config, PreTrainedModel, Qwen3_5Config

import tulle
from checkpoints import write_tokenizer
from tulle.compression.job import compress
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.models.source import open_source
from tulle.text.reading import Text

TEXT = Text(("The quick brown fox jumps over the lazy dog. " * 20,), False, ("prose",))
TOKENS = list(b"A fox that is quick jumps over dogs.")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "gemma3": lambda: Gemma3Config(
        text_config=SIZES | {"sliding_window": 8, "pad_token_id": 0},
        vision_config=VISION | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=SIZES | {"model_type": "mistral"},
        vision_config=VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16},
        image_token_index=299,
    ),
    "qwen3_5": lambda: Qwen3_5Config(
        text_config=SIZES
        | {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
           "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                               "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    ),
}  # fmt: skip


def write(folder: Path, kind: str, renamed: bool = False) -> PreTrainedModel:
    """``renamed``: under transformers' own names."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if renamed:
        stored = load_file(folder / "model.safetensors")
        names = {name: name.replace("language_model.model.", "model.language_model.") for name in stored}
        save_file({names[name]: t for name, t in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    return model


@torch.no_grad()
@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_text_part_is_the_model(kind: str, renamed: bool, tmp_path: Path) -> None:
    model = write(tmp_path / "m", kind, renamed)
    expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    source = open_source(tmp_path / "m")
    (note,) = source.notes
    assert note.startswith(f"{kind}: the text part is read; left out: ")
    assert ("model.visual" if kind == "qwen3_5" else "multi_modal_projector") in note
    found = Engine(tmp_path / "m", cache="f32", head="as stored").forward(TOKENS, wanted=range(len(TOKENS)))
    assert np.abs(found - expected).max() <= 5e-5 * np.abs(expected).max()


@torch.no_grad()
def test_compressed_as_a_text_model(tmp_path: Path) -> None:
    """What is written is a text model, which transformers loads, and which has no tensor of the rest."""
    write(tmp_path / "m", "gemma3")
    recipe = {"calibration": {"samples": 2, "length": 24}, "steps": [{"round_to_nearest": {"bits": 8}}]}
    compress(tmp_path / "m", recipe, tmp_path / "out", calibration=TEXT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and "vision_config" not in config
    stored = [name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)]
    assert all(name.startswith(("model.layers.", "model.norm", "model.embed_tokens")) for name in stored)
    expected = tulle.load(tmp_path / "out", dtype=torch.float32)(torch.tensor([TOKENS])).logits[0].numpy()
    found = Engine(tmp_path / "out", cache="f32", head="as stored").forward(TOKENS, wanted=range(len(TOKENS)))
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_a_text_part_of_no_known_family_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", "gemma3")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["model_type"] = "gemma9_text"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="found 'gemma3'"):
        Engine(tmp_path / "m")
