"""Packed checkpoints of large shapes with random weights: what speed depends on is the format, not the numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from compress_large import COMMON, SHAPES  # noqa: E402
from tulle.format.pack import f32_to_bf16, pack_linear  # noqa: E402
from tulle.format.spec import InputSparsitySpec, LinearSpec, QuantizationConfig  # noqa: E402
from tulle.models.checkpoint import write_index  # noqa: E402
from tulle.models.description import Layer, describe  # noqa: E402

GROUP = 128
Packed = tuple[LinearSpec, dict[str, Any]]
MakeLinear = Callable[[np.random.Generator, str, tuple[int, int]], Packed]
"""A linear of a relative name and shape."""


def write_packed(
    folder: Path,
    shape: str,
    bits: int | None,
    sparsity: float,
    input_bits: int | None = None,
    layers: int | None = None,
    dropped: float = 0.0,
    unit: int = 1,
    spared: str | None = None,
) -> None:
    """A checkpoint in bf16 (``bits`` None) or integers in groups of 128 (ternary, ``bits`` 2: a scale per row), with so
    many zeros; Top-K leaves a share of ``dropped`` inputs out, ``unit`` at a time, but of linears
    whose names hold ``spared``. Every block holds the same numbers, in bytes of its own.
    """
    config = COMMON | SHAPES[shape] | {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]

    def linear(generator: np.random.Generator, name: str, shape: tuple[int, int]) -> Packed:
        left_out = 0.0 if spared is not None and spared in name else dropped
        return packed_linear(generator, shape, bits, sparsity, input_bits, left_out, unit)

    write_model(folder, config, linear, packed=bits is not None or sparsity > 0)


def write_model(folder: Path, config: dict[str, Any], linear: MakeLinear, packed: bool = True) -> None:
    """A checkpoint of any family, its linears as ``linear`` makes them; vectors hold ones, other tensors random
    numbers. Blocks whose mixers are of one kind hold the same ones. ``packed``: the config says so."""
    model = describe(config)
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    specs: dict[str, LinearSpec] = {}
    blocks: dict[type, tuple[dict[str, LinearSpec], dict[str, Any]]] = {}
    shards: dict[str, list[str]] = {}
    size_of_all = 0
    for layer in model.layers:
        kind = type(layer.mixer)
        if kind not in blocks:
            blocks[kind] = _block(generator, layer, linear)
        own, block = blocks[kind]
        specs |= {layer.prefix + name: spec for name, spec in own.items()}
        tensors = {layer.prefix + name: stored(array) for name, array in block.items()}
        file = f"model-{layer.index:05d}.safetensors"
        shards[file] = list(tensors)
        size_of_all += sum(array.nbytes for array in block.values())
        save_file(tensors, folder / file)
    outer = {k: _numbers(generator, s) for k, s in model.outer_tensors().items()}
    save_file({k: stored(v) for k, v in outer.items()}, folder / "model-outer.safetensors")
    shards["model-outer.safetensors"] = list(outer)
    write_index(folder, shards, size_of_all + sum(v.nbytes for v in outer.values()))
    if packed:
        config = config | {"quantization_config": QuantizationConfig(specs).to_json()}
    (folder / "config.json").write_text(json.dumps(config))


def _block(
    generator: np.random.Generator, layer: Layer, linear: MakeLinear
) -> tuple[dict[str, LinearSpec], dict[str, Any]]:
    """Specs of a layer's linears, and all of its tensors. Routers stay dense."""
    specs: dict[str, LinearSpec] = {}
    groups = [group for group in layer.all_groups() if group.role != "router"]
    linears = {one.name: one.shape for group in groups for one in group.linears}
    block = {k: _numbers(generator, s) for k, s in layer.tensors().items() if k.removesuffix(".weight") not in linears}
    for name, shape in linears.items():
        specs[name], arrays = linear(generator, name, shape)
        block |= {f"{name}.{suffix}": array for suffix, array in arrays.items()}
    return specs, block


def _numbers(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bits of bfloat16."""
    if len(shape) < 2:
        return f32_to_bf16(np.ones(shape, np.float32))
    return f32_to_bf16(0.02 * generator.standard_normal(shape, np.float32))


def stored(array: np.ndarray) -> torch.Tensor:
    """As it is written: uint16 arrays are the bits of bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def packed_linear(
    generator: np.random.Generator,
    shape: tuple[int, int],
    bits: int | None,
    sparsity: float,
    input_bits: int | None,
    dropped: float = 0.0,
    unit: int = 1,
) -> Packed:
    """A random linear. Unquantised and dense: a spec all the same, of the plain weight."""
    mask = generator.random(shape, np.float32) >= sparsity if sparsity else None
    kept = None if mask is None else int(mask.sum())
    if bits is None:
        values = f32_to_bf16(0.02 * generator.standard_normal(shape, np.float32))
        spec = LinearSpec(shape, sparse=mask is not None, nonzeros=kept, values_dtype="bfloat16")
        return spec, pack_linear(spec, values, mask)
    group = None if bits == 2 else GROUP
    chosen = (
        InputSparsitySpec("top_k", keep=shape[1] - unit * round(dropped * shape[1] / unit), unit=unit)
        if dropped
        else None
    )
    spec = LinearSpec(
        shape, bits, group, sparse=mask is not None, nonzeros=kept, input_bits=input_bits, values_dtype=None,
        input_sparsity=chosen,
    )  # fmt: skip
    codes = generator.integers(int(bits == 2), 1 << bits, shape, np.uint8)
    scale = f32_to_bf16(np.full((shape[0], spec.groups), 0.02 / (1 << (bits - 1)), np.float32))
    return spec, pack_linear(spec, codes, mask, scale)
