"""Tiny compressed models on disk, made by hand, so that tests of loading do not depend on compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tulle.format.pack import BYTE_SCALES, LEVELS, bf16_to_f32, f32_to_bf16, pack_linear, unpack_linear
from tulle.format.spec import LinearSpec, QuantizationConfig

ROLES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
TABLES = {"model.embed_tokens": "embedding", "lm_head": "head"}
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pack_random(weight: np.ndarray, seed: int = 0, **scheme: Any) -> tuple[LinearSpec, dict[str, np.ndarray]]:
    """Packs W ``[C_out, C_in]`` by rounding; ``sparse`` keeps a random half, or 2 of 4 with a pattern."""
    shape = weight.shape
    mask = None
    if scheme.get("sparse"):
        mask = np.random.default_rng(seed).random(shape) < 0.5
        if scheme.get("pattern"):
            mask = np.tile(np.array([True, False, False, True]), weight.size // 4).reshape(shape)
        scheme["nonzeros"] = int(mask.sum())
    spec = LinearSpec(shape=shape, **scheme)
    if spec.values_dtype == "bfloat16":
        return spec, pack_linear(spec, f32_to_bf16(weight), mask)
    if spec.values_dtype is not None:
        return spec, pack_linear(spec, weight.astype(spec.values_dtype), mask)
    assert spec.bits is not None
    if spec.format != "int":
        return spec, pack_linear(spec, mask=mask, **random_floats(weight, spec))
    grouped = weight.reshape(shape[0], spec.groups, -1)
    levels = 1 << spec.bits
    if spec.symmetric:
        scale = f32_to_bf16((np.abs(grouped).max(-1) / (levels / 2 - 0.5)).astype(np.float32))
        zero = np.full(scale.shape, levels // 2)
    else:
        scale = f32_to_bf16(((grouped.max(-1) - grouped.min(-1)) / (levels - 1)).astype(np.float32))
        zero = np.clip(np.round(-grouped.min(-1) / bf16_to_f32(scale)), 0, levels - 1)
    step, row_scale = bf16_to_f32(scale), None
    if spec.scale_bits == 8:
        row_scale = f32_to_bf16(step.max(-1) / 250)
        scale = np.clip(np.round(step / bf16_to_f32(row_scale)[:, None]), 1, 255).astype(np.uint8)
        step = scale * bf16_to_f32(row_scale)[:, None]
    codes = np.round(grouped / step[..., None]) + zero[..., None]
    codes = np.clip(codes, 0, levels - 1).astype(np.uint8).reshape(shape)
    return spec, pack_linear(spec, codes, mask, scale, None if spec.symmetric else zero.astype(np.uint8), row_scale)


def random_floats(weight: np.ndarray, spec: LinearSpec) -> dict[str, np.ndarray]:
    """Arguments of ``pack_linear`` for W in a float format: roughly rounded, every code used."""
    grouped = weight.reshape(spec.shape[0], spec.groups, -1)
    wanted = np.maximum(np.abs(grouped).max(-1) / 6, 1e-6)
    whole = 2.0 ** np.ceil(np.log2(wanted.max() / 448))
    if spec.format == "mxfp4":
        scale = (np.round(np.log2(wanted)) + 127).astype(np.uint8)
        arrays = {"scale": scale}
    else:
        scale = torch.from_numpy(wanted / whole).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        arrays = {"scale": scale, "tensor_scale": np.array([whole], np.float32)}
    step = BYTE_SCALES[spec.format][scale] / 2 * (whole if spec.format == "nvfp4" else 1)
    nearest = np.abs(grouped[..., None] / step[..., None, None] - LEVELS).argmin(-1)
    return arrays | {"values": nearest.astype(np.uint8).reshape(spec.shape)}


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A packed array as it is stored: uint16 arrays are bfloat16 bits."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def write_model(
    folder: Path, schemes: dict[str, dict[str, Any]], dtype: str = "float32", **config: Any
) -> torch.nn.Module:
    """Writes a compressed random Llama (2 layers, d 64, GQA 4/2); returns the dense model of its weights.

    ``schemes``: role ("all" for every role; "q_proj" and the like for one linear; "embedding", "head") → fields of
    LinearSpec; other linears stay dense, in ``dtype``.
    The returned model computes in float32.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    settings = sizes | heads | {"tie_word_embeddings": False, "initializer_range": 0.1, "dtype": dtype}
    llama = LlamaConfig(**(settings | config))
    model = AutoModelForCausalLM.from_config(llama, dtype=FLOATS[dtype]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # transformers begins with zeros
                parameter.normal_(std=0.1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if llama.tie_word_embeddings:
        del state["lm_head.weight"]
    linears: dict[str, LinearSpec] = {}
    dense = model.float()
    for number, (key, module) in enumerate(model.named_modules()):
        role = next((r for r, names in ROLES.items() if key.rpartition(".")[2] in names), None)
        scheme = schemes.get(key.rpartition(".")[2], schemes.get(role, schemes.get("all"))) if role else None
        if key in TABLES and f"{key}.weight" in state:
            scheme = schemes.get(TABLES[key])
        if scheme is None:
            continue
        spec, arrays = pack_random(state.pop(key + ".weight").float().numpy(), number, **dict(scheme))
        linears[key] = spec
        state |= {f"{key}.{suffix}": as_torch(array) for suffix, array in arrays.items()}
        for suffix, (_, shape) in spec.input_tensors().items():
            # The same for linears that share an input.
            scores = torch.rand(shape, generator=torch.Generator().manual_seed(sum(map(ord, str(role)))))
            state[f"{key}.{suffix}"] = scores + 0.1
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(unpack_linear(spec, arrays)))
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    written = llama.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": QuantizationConfig(linears, {"steps": []}).to_json(),
    }
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text("{}")
    return dense


def tokens(count: int = 24) -> torch.Tensor:
    return torch.randint(0, 128, (2, count), generator=torch.Generator().manual_seed(1))
