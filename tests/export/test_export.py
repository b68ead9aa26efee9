"""Exports: what is written, that plain transformers reads it, and that a failed export leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import PROSE, write_checkpoint
from family_folders import write_family
from tiny_models import write_model
from tulle.cli.main import run
from tulle.compression.job import compress
from tulle.errors import UserError
from tulle.export import check, compressed_tensors, export
from tulle.export.folder import Entry, whole_folder, write_entries
from tulle.text.reading import Text

FP4 = {
    form: {"bits": 4, "group_size": size, "scale_bits": 8, "format": form}
    for form, size in (("mxfp4", 32), ("nvfp4", 16))
}
SCHEMES = {
    "w4a16": {"all": {"bits": 4}},
    "w4a16-g32": {"all": {"bits": 4, "group_size": 32}},
    "w4a16-asymmetric": {"all": {"bits": 4, "group_size": 32, "symmetric": False}},
    "w8a16": {"all": {"bits": 8}},
    "w8a16-asymmetric": {"all": {"bits": 8, "symmetric": False}},
    "w8a8": {"all": {"bits": 8, "input_bits": 8}},
    "w8a8-asymmetric": {"all": {"bits": 8, "input_bits": 8, "symmetric": False}},
    "w4a8": {"all": {"bits": 4, "group_size": 64, "input_bits": 8}},
    "sparse-w4": {"all": {"bits": 4, "group_size": 32, "sparse": True}},
    "sparse-w8-asymmetric": {"all": {"bits": 8, "symmetric": False, "sparse": True, "input_bits": 8}},
    "2:4-w8": {"all": {"bits": 8, "sparse": True, "pattern": "2:4"}},
    "by-role": {"qkv": {"bits": 8, "input_bits": 8}, "down": {"bits": 4, "group_size": 64}, "o": {"bits": 4}},
}
FLOATS = {
    "mxfp4": ({"all": FP4["mxfp4"]}, {"mxfp4-pack-quantized"}),
    "nvfp4": ({"all": FP4["nvfp4"]}, {"nvfp4-pack-quantized"}),
    "sparse": ({"all": FP4["nvfp4"] | {"sparse": True}}, {"nvfp4-pack-quantized"}),
    "mixed": (
        {"qkv": FP4["mxfp4"], "o": {"bits": 4}, "down": FP4["nvfp4"]},
        {"mxfp4-pack-quantized", "pack-quantized", "nvfp4-pack-quantized"},
    ),
}
LOOP = """
import json
for line in sys.stdin:
    try:
        logits(*json.loads(line))
        print("@done", flush=True)
    except Exception as error:
        print("@failed", type(error).__name__, str(error).splitlines()[0], flush=True)
"""


@pytest.fixture(scope="module")
def plain_process():
    """The process of the check, started once for all tests: starting it is most of its time."""
    process = subprocess.Popen(
        [sys.executable, "-c", check.LOADER + LOOP],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def plain(plain_process, tmp_path, monkeypatch):
    def logits(folder, tokens, mode=""):
        given, made = tmp_path / "tokens.npy", tmp_path / "logits.npy"
        np.save(given, tokens)
        plain_process.stdin.write(json.dumps([str(folder), str(given), str(made), mode]) + "\n")
        plain_process.stdin.flush()
        answer = next(line for line in plain_process.stdout if line.startswith("@")).strip()
        if answer != "@done":
            raise UserError(answer)
        return np.load(made)

    monkeypatch.setattr(check, "_plain_logits", logits)


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(plain, tmp_path, name):
    pytest.importorskip("compressed_tensors")
    source, out = tmp_path / "m", tmp_path / "out"
    write_model(source, SCHEMES[name], attention_bias=name == "w8a8")
    result = export(source, "compressed-tensors", out)
    # The same float32 operations on the same weights: anything but rounding is an error.
    assert result["difference"] < 1e-6
    if not any("input_bits" in scheme for scheme in SCHEMES[name].values()):
        # Some versions of transformers read asymmetric weights in bfloat16 only; the command says so.
        if "asymmetric" in name and result["difference_from_packed"] >= 1e-6:
            assert "dequantise" in result["notes"][-1]
        else:
            assert result["difference_from_packed"] < 1e-6 and "dequantise" not in str(result["notes"])
    else:
        assert any("127.5" in note for note in result["notes"])
    assert result["difference_from_packed"] < 0.1
    config = quantization_config(out)
    assert config["sparsity_config"] == {} and "lm_head" in config["ignore"]
    formats = {g["format"] for g in config["config_groups"].values()}
    integer = name in ("w8a8", "w8a8-asymmetric", "sparse-w8-asymmetric")
    assert formats == (
        {"pack-quantized", "int-quantized"} if name == "by-role" else {"int-quantized" if integer else "pack-quantized"}
    )
    tensors = load_file(out / "model.safetensors")
    key = "model.layers.1.mlp.down_proj"
    if integer:
        assert tensors[f"{key}.weight"].dtype == torch.int8
    else:
        bits = 4 if "w4" in name or name == "by-role" else 8
        assert tensors[f"{key}.weight_packed"].shape == (64, 192 * bits // 32)
    assert sum(t.nbytes for t in tensors.values()) == result["bytes"]
    assert (out / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", FLOATS)
def test_floats_of_four_bits(plain, tmp_path, name):
    pytest.importorskip("compressed_tensors")
    schemes, formats = FLOATS[name]
    write_model(tmp_path / "m", schemes)
    result = export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    assert result["difference"] < 1e-6 and result["difference_from_packed"] < 1e-6
    assert any("load the export with dtype=torch.bfloat16" in note for note in result["notes"])
    assert {g["format"] for g in quantization_config(tmp_path / "out")["config_groups"].values()} == formats
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    key = "model.layers.1.mlp.down_proj"
    weight = tensors[f"{key}.weight_packed"]
    assert weight.dtype == torch.uint8 and weight.shape == (64, 96)
    divisor = tensors.get(f"{key}.weight_global_scale")
    assert (divisor is None) == (name == "mxfp4")
    scale = tensors[f"{key}.weight_scale"]
    assert scale.dtype == (torch.uint8 if name == "mxfp4" else torch.float8_e4m3fn)


def test_groups_name_their_linears(plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", SCHEMES["by-role"])
    export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    config = quantization_config(tmp_path / "out")
    targets = sorted(len(g["targets"]) for g in config["config_groups"].values())
    assert targets == [2, 2, 6]
    assert "model.layers.1.self_attn.q_proj" in config["config_groups"]["group_0"]["targets"]
    assert config["format"] == "mixed-precision"
    assert [n for n in config["ignore"] if ".0." in n] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


def fused_schemes(folder, layers=2):
    """What vLLM finds for the parts of each fused linear: the number of a config group, or "ignored"."""
    config = quantization_config(folder)
    found = []
    for layer in range(layers):
        for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            names = [f"model.layers.{layer}.{part}" for part in parts]
            groups = config["config_groups"].items()
            found.append({
                "ignored" if name in config["ignore"]
                else next(key for key, group in groups if group["targets"] == ["Linear"] or name in group["targets"])
                for name in names
            })  # fmt: skip
    return found


def test_fused_linears_of_nvfp4_get_one_scale_of_the_tensor(plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    dense = write_model(tmp_path / "m", {"all": FP4["nvfp4"]})
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    for name, power in zip(names, (0, 2, -3), strict=True):
        tensors[f"{name}.tensor_scale"] *= 2.0**power
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"):
        tensors[f"{name}.scale"][0, :2] = torch.tensor([1, 126], dtype=torch.uint8)  # the ends of the range
    tensors["model.layers.0.mlp.up_proj.tensor_scale"] *= 4
    save_file(tensors, file, {"format": "pt"})
    result = export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    assert result["difference_from_packed"] < 1e-6
    found = load_file(tmp_path / "out" / "model.safetensors")
    divisors = {name: found[f"{name}.weight_global_scale"].item() for name in names}
    assert set(divisors.values()) == {1 / max(tensors[f"{name}.tensor_scale"].item() for name in names)}
    for name, power in zip(names, (0, 2, -3), strict=True):
        assert torch.equal(floats_by_hand(found, name), dense.get_submodule(name).weight * 2.0**power)
    up, gate = (found[f"model.layers.0.mlp.{part}_proj.weight_global_scale"] for part in ("up", "gate"))
    assert up.item() != gate.item()
    assert [n for n in result["notes"] if "vLLM will round" in n and "layers.0.mlp.gate_proj" in n]


def floats_by_hand(tensors, name):
    """The weight of a linear of nvfp4 in the export, from compressed-tensors' definition."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    numbers = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
    return numbers * (scale / tensors[f"{name}.weight_global_scale"]).repeat_interleave(16, 1)


W4 = {"bits": 4, "group_size": 32}
ONE_SCHEME = {
    # Own scheme of k_proj, and the scheme that all of q, k, v get: bits, group size, symmetric.
    "bits": ({"bits": 8}, {"bits": 4}, (8, None, True)),
    "groups": ({"bits": 4, "group_size": 16}, W4, (4, 16, True)),
    "a step per channel": ({"bits": 4}, W4, (4, 32, True)),
    "zero points": ({"bits": 4, "group_size": 32, "symmetric": False}, W4, (4, 32, False)),
    "all of them, and masks": (
        {"bits": 8, "symmetric": False, "sparse": True}, {"bits": 4, "group_size": 16}, (8, 16, False),
    ),
    "quantised inputs": (
        {"bits": 8, "symmetric": False, "input_bits": 8}, {"bits": 4, "input_bits": 8}, (8, None, False),
    ),
}  # fmt: skip


def by_hand(tensors, name, bits, shape):
    """The weight of a linear in the export, from the format's definition: Δ·(q − z)."""
    from compressed_tensors.compressors import unpack_from_int32

    if f"{name}.weight" in tensors:
        codes = tensors[f"{name}.weight"]
    else:
        codes = unpack_from_int32(tensors[f"{name}.weight_packed"], bits, torch.Size(shape))
    scale = tensors[f"{name}.weight_scale"].float()
    zero = tensors.get(f"{name}.weight_zero_point", torch.zeros(1, dtype=torch.int8))
    if zero.dtype == torch.int32:
        zero = unpack_from_int32(zero, bits, scale.shape, packed_dim=0)
    grouped = codes.float().reshape(*scale.shape, -1)
    return ((grouped - zero.float()[..., None]) * scale[..., None]).reshape(shape)


@pytest.mark.parametrize("name", ONE_SCHEME)
def test_a_fused_group_gets_one_scheme_without_loss(plain, tmp_path, monkeypatch, name):
    pytest.importorskip("compressed_tensors")
    own, others, (bits, group_size, symmetric) = ONE_SCHEME[name]
    dense = write_model(tmp_path / "m", {"all": others, "k_proj": own})
    if not symmetric:  # transformers does not read a mixture of grids with and without zero points
        monkeypatch.setattr(check, "check", lambda *_: {"difference": 0.0, "difference_from_packed": 0.0})
    result = export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    assert result["difference"] < 1e-6
    assert all(len(parts) == 1 for parts in fused_schemes(tmp_path / "out"))
    assert any("without loss" in note and "layers.0.self_attn." in note for note in result["notes"])
    groups = quantization_config(tmp_path / "out")["config_groups"].values()
    (scheme,) = [g for g in groups if "model.layers.1.self_attn.v_proj" in g["targets"] or g["targets"] == ["Linear"]]
    found = scheme["weights"]
    assert (found["num_bits"], found["group_size"], found["symmetric"]) == (bits, group_size, symmetric)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for part in "qkv":
        key = f"model.layers.1.self_attn.{part}_proj"
        weight = dense.get_submodule(key).weight
        assert torch.equal(by_hand(tensors, key, bits, weight.shape), weight), part


def test_what_is_fused_with_a_plain_weight_becomes_one(plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", {"all": {"bits": 8, "input_bits": 8}, "v_proj": None, "up_proj": None}, "bfloat16")
    result = export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    assert fused_schemes(tmp_path / "out") == [{"ignored"}] * 4
    assert any("plain weights" in note and "layers.1.mlp.gate_proj" in note for note in result["notes"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == torch.int8
    assert result["difference"] < 1e-2  # inputs of o and down are rounded


def test_no_group_is_left_that_could_be_quantised(tmp_path):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", {"qkv": {"bits": 8}, "v_proj": None})
    with pytest.raises(UserError, match=r"compress again with keep_sensitive: \{siblings: true\}"):
        export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


KEPT = {
    "w8a8": [{"keep_sensitive": {"count": 3}}, {"activations": {"bits": 8, "symmetric": True}}, {"gptq": {"bits": 8}}],
    "w4, kept in 8": [{"keep_sensitive": {"count": 3, "bits": 4, "keep_bits": 8, "input_bits": None}}, {"gptq": {}}],
    "w4, kept": [{"keep_sensitive": {"count": 3, "bits": 4, "input_bits": None}}, {"gptq": {"group_size": "auto"}}],
    "by role": [
        {"gptq": {"bits": 4, "group_size": 32, "targets": ["qkv", "gate_up"]}},
        {"gptq": {"bits": 8, "targets": ["o", "down"]}},
    ],
}


@pytest.mark.parametrize("name", KEPT)
def test_compression_chooses_one_scheme_per_fused_group(plain, tmp_path, name):
    """Before anything is lost: the export has nothing to mend."""
    pytest.importorskip("compressed_tensors")
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    with torch.no_grad():  # so that some linears of fused groups are among the most sensitive
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[0, 0] = layer.mlp.gate_proj.weight[0, 0] = 20.0
    model.save_pretrained(tmp_path / "m")
    recipe = {"steps": KEPT[name], "calibration": {"samples": 3, "length": 32}}
    report = compress(tmp_path / "m", recipe, tmp_path / "packed", calibration=Text((PROSE,), False, ("prose",)))
    if "kept" in name or name == "w8a8":
        assert any("keep them too, for readers that fuse the group" in note for note in report["notes"])
    result = export(tmp_path / "packed", "compressed-tensors", tmp_path / "out")
    assert all(len(parts) == 1 for parts in fused_schemes(tmp_path / "out"))
    assert not any("vLLM" in note for note in result["notes"])


FAMILIES = {"phi3": 4, "gemma2": 4, "cohere2": 8, "starcoder2": 8, "bitnet": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_of_other_families(plain, tmp_path, family):
    """Fused tensors, norms after and of 1 + w, layer norms, parallel residuals, no gate, inner norms; 8: w8a8."""
    pytest.importorskip("compressed_tensors")
    folder, bits = write_family(tmp_path / "m", family, 1), FAMILIES[family]
    steps = [{"activations": {"bits": 8, "symmetric": True}}] * (bits == 8) + [{"round_to_nearest": {"bits": bits}}]
    settings = {"calibration": {"samples": 2, "length": 24}, "steps": steps}
    compress(folder, settings, tmp_path / "packed", calibration=Text((PROSE,), False, ("prose",)))
    result = export(tmp_path / "packed", "compressed-tensors", tmp_path / "out")
    assert result["difference"] < 1e-5
    assert bits == 8 or result["difference_from_packed"] < 1e-5


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dense(plain, tmp_path, dtype, stored):
    schemes = {
        "qkv": {"bits": 3},
        "o": {"bits": 8, "symmetric": False},
        "down": {"sparse": True, "values_dtype": "float32"},
    }
    source, out = tmp_path / "m", tmp_path / "out"
    model = write_model(source, schemes, dtype=stored, tie_word_embeddings=True)
    result = export(source, "dense", out, dtype)
    kind = dtype or stored
    assert result["difference"] < 1e-6
    assert result["difference_from_packed"] < {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[kind]
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == kind
    tensors = load_file(out / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{kind}"}
    for key, weight in model.state_dict().items():
        if key != "lm_head.weight":
            assert torch.equal(tensors[key], weight.to(getattr(torch, kind)))


EVERYTHING = {
    "dense": {"bits": 4, "group_size": 32, "symmetric": False, "scale_bits": 8},
    "compressed-tensors": {"bits": 4, "group_size": 32},
}
TABLE = {"bits": 6, "group_size": 32, "symmetric": False, "scale_bits": 8}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("to", ["dense", "compressed-tensors"])
def test_embedding_and_head_in_codes(plain, tmp_path, to, tied):
    """Both are written as plain weights."""
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    schemes = {"all": EVERYTHING[to], "embedding": TABLE} | ({} if tied else {"head": {"bits": 8}})
    write_model(tmp_path / "m", schemes, tie_word_embeddings=tied)
    result = export(tmp_path / "m", to, tmp_path / "out", dtype="float32")
    assert result["difference"] < 1e-6
    assert result["difference_from_packed"] < 1e-5
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert ("lm_head.weight" in tensors) != tied


def test_dense_drops_quantised_inputs_and_says_so(plain, tmp_path):
    write_model(tmp_path / "m", SCHEMES["w8a8"])
    result = export(tmp_path / "m", "dense", tmp_path / "out")
    assert result["difference"] < 1e-6 < result["difference_from_packed"]
    assert "inputs are quantised" in result["notes"][0]


def test_command_checks_in_its_own_process(tmp_path, capsys):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", SCHEMES["w4a16-g32"])
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "m"), "--to", "compressed-tensors", "-o", str(out), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "compressed-tensors" and result["difference"] < 1e-4
    assert result["bytes"] == sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    "scheme, to, message",
    [
        ({"bits": 3}, "compressed-tensors", "expected 4 or 8 bits.*found 3"),
        ({"sparse": True, "values_dtype": "float32"}, "compressed-tensors", "sparse unquantised.*use --to dense"),
        ({"values_dtype": "float32"}, "compressed-tensors", "expected quantised linears"),
        ({"values_dtype": "float32", "input_bits": 8}, "compressed-tensors", "quantised inputs without"),
        ({"bits": 4, "scale_bits": 8}, "compressed-tensors", "no scales of 8 bits"),
        (FP4["mxfp4"] | {"input_bits": 8}, "compressed-tensors", "no quantised inputs of floats"),
        ({"bits": 4}, "onnx", "expected --to compressed-tensors or dense or gguf, found 'onnx'"),
    ],
)
def test_refusals(tmp_path, capsys, scheme, to, message):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", {"all": scheme})
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m", to, tmp_path / "out")
    assert run(["export", str(tmp_path / "m"), "--to", to, "-o", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["m"]


def test_other_bad_input(tmp_path, monkeypatch):
    source, out = tmp_path / "m", tmp_path / "out"
    model = write_model(source, SCHEMES["w4a16"])
    with pytest.raises(UserError, match="--dtype"):
        export(source, "dense", out, "int8")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="found a dense model"):
        export(tmp_path / "dense", "dense", out)
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(UserError, match="new or empty"):
        export(source, "dense", out)
    assert os.listdir(out) == ["mine"]
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r"pip install 'tulle\[export\]'"):
        export(source, "compressed-tensors", tmp_path / "other")


def test_a_wrong_export_is_found_and_removed(plain, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", SCHEMES["w4a16"])
    right = compressed_tensors._signed_codes
    monkeypatch.setattr(compressed_tensors, "_signed_codes", lambda *given: right(*given).roll(1, 0))
    with pytest.raises(UserError, match="expected the export's logits within"):
        export(tmp_path / "m", "compressed-tensors", tmp_path / "out")
    assert {"out", "out.partial"}.isdisjoint(os.listdir(tmp_path))


def test_full_disk(tmp_path, monkeypatch):
    write_model(tmp_path / "m", SCHEMES["w4a16"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        export(tmp_path / "m", "dense", tmp_path / "out")
    assert os.listdir(tmp_path) == ["m"]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("x")
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["whole"]


def test_shards(tmp_path):
    tensors = {
        f"t{i}": torch.full((3, i + 1), i, dtype=d)
        for i, d in enumerate([torch.int8, torch.bfloat16, torch.float32, torch.int64])
    }
    live = []

    def make(tensor):
        live.append(tensor)
        return tensor

    entries = [Entry(k, t.dtype, tuple(t.shape), lambda t=t: make(t)) for k, t in tensors.items()]
    steps = []
    total = write_entries(tmp_path, entries, lambda done, all_: steps.append((done, all_)), shard_bytes=50)
    assert total == sum(t.nbytes for t in tensors.values()) and steps[-1] == (total, total) and len(live) == 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        found = load_file(tmp_path / file)[name]
        assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name])


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "mixtral"])
def test_experts_stand_as_the_family_has_them(plain, tmp_path, family):
    """In one tensor or apart, under transformers' own names and of its shapes, so that it reads them."""
    write_family(tmp_path / "dense", family, 1)
    recipe = {"calibration": {"samples": 2, "length": 24}, "steps": [{"gptq": {"bits": 4}}]}
    compress(tmp_path / "dense", recipe, tmp_path / "packed", calibration=Text((PROSE,), False, ("prose",)))
    result = export(tmp_path / "packed", "dense", tmp_path / "out")
    assert result["difference"] < 1e-6 and result["difference_from_packed"] < 1e-6
    wanted, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "out"))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    for name in wanted:
        size = wanted[name].norm()
        assert float((found[name] - wanted[name]).norm() / size) < (0.5 if wanted[name].ndim > 1 else 1e-6), name
