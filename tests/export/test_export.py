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
from safetensors.torch import load_file

from tiny_models import write_model
from tulle.cli.main import run
from tulle.errors import UserError
from tulle.export import check, compressed_tensors, export
from tulle.export.folder import Entry, whole_folder, write_entries

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
    with pytest.raises(UserError, match="pip install compressed-tensors"):
        export(source, "compressed-tensors", tmp_path / "other")


def test_a_wrong_export_is_found_and_removed(plain, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    write_model(tmp_path / "m", SCHEMES["w4a16"])
    right = compressed_tensors._signed_codes
    monkeypatch.setattr(compressed_tensors, "_signed_codes", lambda spec, tensors: right(spec, tensors).roll(1, 0))
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
