"""Other tools' quantised checkpoints. The oracle packs by the published layouts, one field at a time, on its own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import PROSE, write_checkpoint, write_tokenizer
from family_folders import write_family
from tulle.compression.job import compress
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.evaluate.loading import load_model
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import PlainDecoder
from tulle.models.foreign import awq as awq_format
from tulle.models.foreign import compressed_tensors as ct_format
from tulle.models.foreign import fp8 as fp8_format
from tulle.models.foreign import gptq as gptq_format
from tulle.models.source import open_source
from tulle.text.reading import Text

SHAPES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
TOKENS = [3, 100, 7, 250, 31, 31, 90]
Tensors = dict[str, torch.Tensor]
Packer = Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]
"""Random numbers, C_out, C_in → tensors of a linear by suffix, and the W that they mean in float64."""


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of codes as rows of int32, each a stream of bits, written one code at a time."""
    rows = []
    for row in codes:
        stream = 0
        for i, code in enumerate(row):
            stream |= int(code) << (i * bits)
        count = -(-len(row) * bits // 32)
        rows.append([(stream >> (32 * n)) & 0xFFFFFFFF for n in range(count)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def gptq(bits: int, group: int, act_order: bool, version: int, sure: bool = True) -> Packer:
    """``sure``: no zero of 0, which version 1 cannot say apart from a borrow."""

    def pack(draw: np.random.Generator, outputs: int, inputs: int) -> tuple[Tensors, np.ndarray]:
        size = inputs if group == -1 else group
        count = inputs // size
        codes = draw.integers(0, 1 << bits, (outputs, inputs))
        zeros = draw.integers(int(sure), 1 << bits, (outputs, count))
        scales = draw.uniform(0.01, 0.03, (outputs, count)).astype(np.float16)
        g_idx = np.arange(inputs) // size
        if act_order:
            g_idx = draw.permutation(g_idx)
        stored = words((zeros.T - 1) % (1 << bits) if version == 1 else zeros.T, bits)
        if version == 1 and not sure:  # as GPTQModel: 1 is subtracted from the fields of a word at once
            whole = words(zeros.T, bits).numpy().view(np.uint32)
            ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
            stored = torch.from_numpy((whole - ones).view(np.int32))
        tensors = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": stored,
            "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }
        return tensors, scales.astype(np.float64)[:, g_idx] * (codes - zeros[:, g_idx])

    return pack


def awq(group: int) -> Packer:
    def pack(draw: np.random.Generator, outputs: int, inputs: int) -> tuple[Tensors, np.ndarray]:
        codes = draw.integers(0, 16, (outputs, inputs))
        zeros = draw.integers(0, 16, (outputs, inputs // group))
        scales = draw.uniform(0.01, 0.03, zeros.shape).astype(np.float16)

        def eights(matrix: np.ndarray) -> torch.Tensor:  # [R, C_out] → [R, C_out/8]
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            found = np.zeros((len(matrix), outputs // 8), np.uint32)
            for row in range(len(matrix)):
                for word in range(outputs // 8):
                    for field in range(8):
                        found[row, word] |= np.uint32(int(matrix[row, word * 8 + order[field]]) << (4 * field))
            return torch.from_numpy(found.view(np.int32))

        tensors = {"qweight": eights(codes.T), "qzeros": eights(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
        wide = lambda x: np.repeat(x, group, axis=1)  # noqa: E731
        return tensors, wide(scales.astype(np.float64)) * (codes - wide(zeros))

    return pack


def pack_quantized(bits: int, group: int | None, symmetric: bool, act_order: bool = False) -> Packer:
    def pack(draw: np.random.Generator, outputs: int, inputs: int) -> tuple[Tensors, np.ndarray]:
        half, size = 1 << (bits - 1), group or inputs
        codes = draw.integers(-half, half, (outputs, inputs))
        zeros = draw.integers(-half, half, (outputs, inputs // size)) * (not symmetric)
        scales = torch.from_numpy(draw.uniform(0.01, 0.03, zeros.shape)).to(torch.bfloat16)
        g_idx = np.arange(inputs) // size
        if act_order:
            g_idx = draw.permutation(g_idx)
        tensors = {
            "weight_packed": words(codes + half, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words((zeros + half).T, bits).T.contiguous()
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        return tensors, scales.double().numpy()[:, g_idx] * (codes - zeros[:, g_idx])

    return pack


def int_quantized(symmetric: bool, per: str) -> Packer:
    def pack(draw: np.random.Generator, outputs: int, inputs: int) -> tuple[Tensors, np.ndarray]:
        codes = draw.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        shape = {"channel": (outputs, 1), "tensor": (1,), "group": (outputs, inputs // 16)}[per]
        scales = draw.uniform(0.001, 0.002, shape).astype(np.float32)
        zeros = (draw.integers(-20, 20, shape) * (not symmetric)).astype(np.int8)
        tensors = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scales)}
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros)
        wide = lambda x: np.repeat(x, 16, axis=1) if per == "group" else x  # noqa: E731
        return tensors, wide(scales.astype(np.float64)) * (codes.astype(np.float64) - wide(zeros))

    return pack


def fp8(suffix: str, block: tuple[int, int] | None, per: str = "tensor", power: bool = False) -> Packer:
    """By torch's own float8; ``power``: scales are powers of two in 8 bits."""

    def pack(draw: np.random.Generator, outputs: int, inputs: int) -> tuple[Tensors, np.ndarray]:
        values = torch.from_numpy(draw.normal(0, 60, (outputs, inputs))).to(torch.float8_e4m3fn)
        shape: tuple[int, ...] = {"tensor": (), "channel": (outputs, 1)}[per]
        if block:
            shape = (-(-outputs // block[0]), -(-inputs // block[1]))
        scales = torch.from_numpy(draw.uniform(0.0005, 0.001, shape)).float()
        if power:
            scales = torch.exp2(torch.from_numpy(draw.integers(-12, -8, shape)).float())
        wide = scales.double().numpy()
        if block:
            wide = wide.repeat(block[0], 0)[:outputs].repeat(block[1], 1)[:, :inputs]
        stored = scales.to(torch.float8_e8m0fnu) if power else scales
        return {"weight": values, suffix: stored}, values.double().numpy() * wide

    return pack


def compressed_tensors(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


BLOCK = {"weight_block_size": [48, 32]}
CASES: dict[str, tuple[dict[str, Any], Packer]] = {
    **{
        f"GPTQ {bits} bits, groups of {group}, act-order {order}, version {version}": (
            {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order}
            | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}),
            gptq(bits, group, order, version, version == 1),
        )
        for bits, group, order, version in (
            (4, 32, False, 1), (4, 32, True, 2), (4, -1, False, 1), (2, 16, True, 1), (3, 32, False, 2),
            (3, 32, True, 1),
            (8, 32, False, 1), (8, -1, True, 2),
        )
    },
    "GPTQ with zeros of 0": ({"quant_method": "gptq", "bits": 4}, gptq(4, 32, False, 1, sure=False)),
    "AWQ": ({"quant_method": "awq", "bits": 4, "version": "GEMM", "zero_point": True}, awq(32)),
    **{
        f"pack-quantized {bits} bits, groups of {group}, symmetric {symmetric}, act-order {order}": (
            compressed_tensors("pack-quantized", num_bits=bits),
            pack_quantized(bits, group, symmetric, order),
        )
        for bits, group, symmetric, order in (
            (4, 32, True, False), (4, 32, False, False), (4, None, False, False), (8, 16, False, True),
            (3, 32, False, False), (2, 32, True, True), (6, None, True, False),
        )
    },
    **{
        f"int-quantized per {per}, symmetric {symmetric}": (
            compressed_tensors("int-quantized", num_bits=8),
            int_quantized(symmetric, per),
        )
        for per in ("channel", "tensor", "group")
        for symmetric in (True, False)
    },
    "float-quantized": (compressed_tensors("float-quantized", num_bits=8), fp8("weight_scale", None, "channel")),
    "float-quantized in blocks": (
        compressed_tensors("float-quantized", num_bits=8, strategy="block", block_structure=[48, 32]),
        fp8("weight_scale", (48, 32)),
    ),
    "FP8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, fp8("weight_scale", None)),
    "FP8 per channel": ({"quant_method": "fbgemm_fp8"}, fp8("weight_scale", None, "channel")),
    "FP8 in blocks": ({"quant_method": "fp8"} | BLOCK, fp8("weight_scale_inv", (48, 32))),
    "FP8 in blocks, powers of two": ({"quant_method": "fp8"} | BLOCK, fp8("weight_scale_inv", (48, 32), power=True)),
}  # fmt: skip


def write_quantised(folder: Path, settings: dict[str, Any], pack: Packer) -> Tensors:
    """A random model with every linear of its layers packed; returns what its tensors mean."""
    write_checkpoint(folder, **SHAPES)
    state, meant = load_file(folder / "model.safetensors"), {}
    draw = np.random.default_rng(0)
    for name in sorted(state):
        if name.endswith("_proj.weight"):
            tensors, weight = pack(draw, *state.pop(name).shape)
            state |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in tensors.items()}
            meant[name] = torch.from_numpy(weight)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return {
        name: state[name] for name in state if name.endswith("norm.weight") or "embed" in name or "head" in name
    } | meant


@pytest.mark.parametrize("case", CASES)
def test_read_back_exactly(case: str, tmp_path: Path) -> None:
    settings, pack = CASES[case]
    meant = write_quantised(tmp_path / "m", settings, pack)
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.names() == sorted(meant) and checkpoint.packed is None
    checkpoint.describe()
    for name, wanted in meant.items():
        found = checkpoint.read(name)
        assert found.shape == wanted.shape == checkpoint.info(name).shape and found.dtype == checkpoint.info(name).dtype
        # Rounded to float32 once, where the product needs more.
        assert torch.equal(found, wanted.to(found.dtype)), name


@pytest.mark.parametrize(
    "case", ["AWQ", "FP8 in blocks", "int-quantized per channel, symmetric False", "GPTQ with zeros of 0"]
)
def test_every_command_computes_the_same(case: str, tmp_path: Path) -> None:
    settings, pack = CASES[case]
    meant = write_quantised(tmp_path / "m", settings, pack)
    dense = tmp_path / "dense"
    write_checkpoint(dense, **SHAPES)
    save_file({k: v.float() for k, v in meant.items()}, dense / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {"threads": 1, "head": "as stored", "cache": "f32"}
    wanted = Engine(dense, **options).forward(TOKENS)
    assert np.array_equal(Engine(tmp_path / "m", **options).forward(TOKENS), wanted)
    model, _ = load_model(tmp_path / "m")
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert any("linears are stored in" in note for note in open_source(tmp_path / "m").notes)


def in_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 numbers, scales of blocks whose largest weight is the format's, and what they mean."""
    scales = torch.stack([
        torch.stack([part.abs().max() / 448 for part in band.split(columns, 1)]) for band in weight.split(rows)
    ])  # fmt: skip
    wide = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    values = (weight / wide).to(torch.float8_e4m3fn)
    return values, scales, values.float() * wide


@pytest.mark.usefixtures("no_pages")
def test_deepseek_v3_as_it_is_published(tmp_path: Path) -> None:
    """Experts and latent attention in FP8, scales in blocks, and a layer behind the last that predicts a further token:
    read as the numbers that they mean, run, and compressed."""
    dense, folder, last = tmp_path / "dense", tmp_path / "fp8", "model.layers.2"
    write_family(dense, "deepseek_v3", 1, num_nextn_predict_layers=1, num_hidden_layers=2)
    shutil.copytree(dense, folder)
    state, stored = load_file(dense / "model.safetensors"), {}
    linears = {n for layer in Checkpoint.open(dense).describe().layers for g in layer.all_groups() if g.role != "router"
               for n in (f"{layer.prefix}{name}.weight" for name in g.names)}  # fmt: skip
    for name in sorted(linears):
        stored[name], stored[f"{name}_scale_inv"], state[name] = in_blocks(state[name], 16, 8)
    stored = {**state, **stored}
    stored |= {f"{last}.{name}": torch.ones(4) for name in ("enorm.weight", "eh_proj.weight")}
    stored[f"{last}.mlp.experts.0.up_proj.weight"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
    stored[f"{last}.mlp.experts.0.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    found = Checkpoint.open(folder)
    assert any("layers behind the last" in note and note.endswith(": 4") for note in found.source.notes)
    assert all(torch.equal(found.read(name), state[name]) for name in linears)
    decoder = found.describe()
    assert any(layer.experts for layer in decoder.layers)
    ours = PlainDecoder(
        decoder,
        lambda index: found.read_layer(decoder.layers[index]),
        {n: found.read(n) for n in decoder.outer_tensors()},
    )
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(torch.tensor([TOKENS])).logits
    assert float((ours(torch.tensor([TOKENS])) - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    recipe = {"calibration": {"samples": 2, "length": 24}, "steps": [{"gptq": {"bits": 4}}]}
    report = compress(folder, recipe, tmp_path / "out", calibration=Text((PROSE,), False, ("prose",)))
    assert report["reload"]["difference"] < 1e-5 and {x["bits"] for x in report["linears"]} == {4}


def change(folder: Path, drop: str = "", **added: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    state = {k: v for k, v in state.items() if k != drop} | added
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor], str, str]] = {
    "another method": ("AWQ", {"quant_method": "hqq"}, {}, "", "found 'hqq'"),
    "bitsandbytes": ("AWQ", {"quant_method": "bitsandbytes"}, {}, "", "found 'bitsandbytes'"),
    "AWQ of another version": ("AWQ", {"version": "gemv"}, {}, "", "found 'gemv'"),
    "GPTQ for Marlin": ("GPTQ with zeros of 0", {"checkpoint_format": "marlin"}, {}, "", "found 'marlin'"),
    "GPTQ of 5 bits": ("GPTQ with zeros of 0", {"bits": 5}, {}, "", "found 5"),
    "NVFP4": (
        "FP8 per tensor",
        compressed_tensors("nvfp4-pack-quantized", num_bits=4),
        {},
        "",
        "found 'nvfp4-pack-quantized'",
    ),
    "sparse": (
        "FP8 per tensor",
        compressed_tensors("dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {},
        "",
        "found sparsity_config 'sparse-24-bitmask'",
    ),
    "an unknown tensor": ("AWQ", {}, {f"{Q}.lora_A": torch.ones(2, 2)}, "", f"found {Q}.lora_A"),
    "a bias that the config denies": ("AWQ", {}, {f"{Q}.bias": torch.ones(64)}, "", f"found {Q}.bias"),
    "missing scales": ("AWQ", {}, {}, f"{Q}.scales", f"expected tensor {Q}.scales"),
    "missing zeros": ("GPTQ with zeros of 0", {}, {}, f"{Q}.qzeros", f"expected tensor {Q}.qzeros"),
    "scales of another shape": ("AWQ", {}, {f"{Q}.scales": torch.ones(3, 64).half()}, "", "3 groups of 64 inputs"),
    "scales without a shape": (
        "AWQ",
        {},
        {f"{Q}.scales": torch.ones(()).half()},
        "",
        f"expected {Q}.scales as a matrix",
    ),
    "groups out of range": (
        "GPTQ with zeros of 0",
        {},
        {f"{Q}.g_idx": torch.full((64,), 2, dtype=torch.int32)},
        "",
        "expected groups from 0 to 1",
    ),
    "FP8 without a scale": ("FP8 in blocks", {}, {}, f"{Q}.weight_scale_inv", "found 0"),
    "FP8 in an embedding": (
        "FP8 in blocks",
        {},
        {"model.embed_tokens.weight": torch.ones(257, 64).to(torch.float8_e4m3fn)},
        "",
        "found model.embed_tokens",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tmp_path: Path) -> None:
    case, changed, added, drop, message = REFUSED[what]
    settings, pack = CASES[case]
    write_quantised(tmp_path / "m", settings | changed, pack)
    change(tmp_path / "m", drop, **added)
    with pytest.raises(UserError) as error:
        checkpoint = Checkpoint.open(tmp_path / "m")
        checkpoint.read(f"{Q}.weight")
    assert message in str(error.value) and "\n" not in str(error.value)


def places(settings: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in the settings something stands."""
    inner = (
        settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


WRONG = (None, True, -1, 10**30, 0.5, "x", [], [None], {}, {"x": 1})
ALL_KEYS = {
    "compressed-tensors": {"sparsity_config": {"format": "dense"}, "transform_config": {"config_groups": {}}},
    "gptq": {"checkpoint_format": "gptq", "is_marlin_format": False},
    "awq": {"version": "gemm", "zero_point": True},
    "fp8": {"fmt": "e4m3", "weight_block_size": [48, 32]},
}


@pytest.mark.parametrize("method", ALL_KEYS)
def test_settings_of_any_type_are_read_or_refused(method: str) -> None:
    readers = {"gptq": gptq_format, "awq": awq_format, "compressed-tensors": ct_format, "fp8": fp8_format}
    found = [case for case, _ in CASES.values() if case["quant_method"] == method]
    for case in [found[0] | ALL_KEYS[method], found[-1] | ALL_KEYS[method]]:
        for path in places(case):
            for wrong in WRONG:
                settings = copy.deepcopy(case)
                inner: Any = settings
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = wrong
                try:
                    readers[method].from_config(settings)
                except UserError as error:
                    assert "\n" not in str(error)


def test_biases_of_zeros_and_scales_of_inputs_are_passed_over(tmp_path: Path) -> None:
    settings, pack = CASES["GPTQ with zeros of 0"]
    write_quantised(tmp_path / "m", settings, pack)
    change(tmp_path / "m", **{f"{Q}.bias": torch.zeros(64), "model.layers.0.self_attn.k_scale": torch.ones(())})
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert f"{Q}.bias" not in checkpoint and any("not applied" in note for note in checkpoint.source.notes)


@pytest.mark.parametrize(("file", "case"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_settings_of_older_packers(file: str, case: str, tmp_path: Path) -> None:
    """In a file of their own, with none in config.json."""
    settings, pack = CASES["AWQ" if case == "AWQ" else "GPTQ with zeros of 0"]
    meant = write_quantised(tmp_path / "m", settings, pack)
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected quantization_config"):
        Checkpoint.open(tmp_path / "m")
    older = {"w_bit": 4, "q_group_size": 32, "version": "GEMM"} if case == "AWQ" else {"bits": 4, "group_size": 32}
    (tmp_path / "m" / file).write_text(json.dumps(older))
    assert torch.equal(Checkpoint.open(tmp_path / "m").read(f"{Q}.weight"), meant[f"{Q}.weight"].float())


@pytest.mark.parametrize("bits", [{"bits": 4, "group_size": 16, "symmetric": False}, {"bits": 8, "input_bits": 8}])
def test_our_own_export_is_read_back(bits: dict[str, Any], tmp_path: Path) -> None:
    from tiny_models import write_model
    from tulle.export import export
    from tulle.format.pack import unpack_linear

    write_model(tmp_path / "m", {"all": bits})
    write_tokenizer(tmp_path / "m")
    export(tmp_path / "m", "compressed-tensors", tmp_path / "ct")
    packed, back = Checkpoint.open(tmp_path / "m"), Checkpoint.open(tmp_path / "ct")
    assert packed.packed is not None
    for name, spec in packed.packed.linears.items():
        arrays = {suffix: packed.source.read(f"{name}.{suffix}") for suffix in spec.tensors()}
        assert np.array_equal(back.source.read(f"{name}.weight"), unpack_linear(spec, arrays)), name
