"""Experts that stand in one tensor: MXFP4 against transformers' own reader, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from random_decoders import largest_difference, reference_model, text
from random_families import family_config, saved_model
from tulle.errors import UserError
from tulle.format.pack import bf16_to_f32
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import PlainDecoder
from tulle.models.source import open_source
from tulle.models.stacked import mxfp4


def test_mxfp4_means_what_transformers_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (1, 6, 3), dtype=torch.uint8, generator=generator)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    found = bf16_to_f32(mxfp4(blocks[0].numpy(), scales[0].numpy()))
    assert np.array_equal(found, wanted.numpy())


def test_mxfp4_experts_of_gpt_oss_run_as_their_numbers(tmp_path: Path) -> None:
    config = family_config("gpt_oss", 1) | {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4}
    model = reference_model(config, 0)
    model.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            rows, groups = parameter.shape[2], parameter.shape[1] // 32
            blocks = torch.randint(0, 256, (4, rows, groups, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(122, 125, (4, rows, groups), dtype=torch.uint8, generator=generator)
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            del state[name]
            state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(state, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint.open(tmp_path)
    info = checkpoint.info("model.layers.0.mlp.experts.1.gate_proj.weight")
    assert (info.name, info.shape, info.bytes) == ("mxfp4", (32, 32), 32 * 17)
    decoder = checkpoint.describe()
    outer = {name: checkpoint.read(name) for name in decoder.outer_tensors() if name in checkpoint}
    ours = PlainDecoder(decoder, lambda index: checkpoint.read_layer(decoder.layers[index]), outer)
    tokens, valid = text(1)
    assert largest_difference(model(tokens, attention_mask=valid.long()).logits[valid], ours(tokens)[valid]) <= 1e-5


def test_experts_stacked_under_transformers_names_are_those_apart(tmp_path: Path) -> None:
    model = reference_model(family_config("qwen3_moe", 0), 0)
    apart, together = saved_model(model, tmp_path / "apart"), tmp_path / "together"
    together.mkdir()
    shutil.copy(tmp_path / "apart" / "config.json", together)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, together / "model.safetensors")
    checkpoint = Checkpoint.open(together)
    for index, layer in enumerate(apart.decoder.layers):
        found, wanted = checkpoint.read_layer(layer), apart._read_block(index)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_stack_of_another_shape_and_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="all experts"):
        open_source(tmp_path)
    save_file({f"{name}_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="_scales beside"):
        open_source(tmp_path)
