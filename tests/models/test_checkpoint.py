"""Checkpoints: every layout reads the same tensors, and every kind of damage gives one clear line."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from tulle.errors import UserError
from tulle.models.checkpoint import INDEX, Checkpoint, write_shard

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 4])
def test_reads_every_tensor_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    model = write_checkpoint(tmp_path / "m", dtype=dtype, shards=shards)
    checkpoint = Checkpoint.open(tmp_path / "m")
    state = model.state_dict()
    assert checkpoint.names() == sorted(state)
    for name in checkpoint.names():
        assert checkpoint.info(name).dtype == dtype
        assert torch.equal(checkpoint.read(name).float(), state[name])
    assert checkpoint.bytes == sum(t.numel() for t in state.values()) * dtype.itemsize


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_model_with_either_name(tmp_path: Path, stored: str) -> None:
    model = write_checkpoint(tmp_path / "m", stored=stored, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(tmp_path / "m")
    model_of = checkpoint.describe()
    assert model_of.embedding_name(checkpoint) == stored
    assert torch.equal(checkpoint.read(stored), model.get_input_embeddings().weight)


def test_block_by_block(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", "qwen3", shards=3)
    checkpoint = Checkpoint.open(tmp_path / "m")
    model_of = checkpoint.describe()
    for i, layer in enumerate(model_of.layers):
        block = checkpoint.read_layer(layer)
        expected = model.model.layers[i].state_dict()
        assert set(block) == set(expected)
        assert all(torch.equal(block[k], expected[k]) for k in block)


def test_written_shard_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.uint8)}
    write_shard(tmp_path / "x.safetensors", tensors)
    assert all(torch.equal(load_file(tmp_path / "x.safetensors")[k], v) for k, v in tensors.items())
    before = (tmp_path / "x.safetensors").read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tulle.models.checkpoint.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(9)})
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _truncate_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"garbage" * 10)


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(name)
    if tensor is not None:
        state[name] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _missing_tensor(folder: Path) -> None:
    _change(folder, "model.layers.1.mlp.up_proj.weight", None)


def _missing_norm(folder: Path) -> None:
    _change(folder, "model.norm.weight", None)


def _wrong_shape(folder: Path) -> None:
    _change(folder, "model.layers.1.mlp.up_proj.weight", torch.ones(63, 32))


def _integers(folder: Path) -> None:
    _change(folder, "model.layers.1.mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.int8))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


DAMAGE = [
    (_truncate, "truncated or corrupt"),
    (_truncate_header, "truncated or corrupt"),
    (_garbage, "truncated or corrupt"),
    (_empty, "truncated or corrupt"),
    (_missing_tensor, "expected tensor model.layers.1.mlp.up_proj.weight"),
    (_missing_norm, "expected tensor model.norm.weight"),
    (_wrong_shape, "of shape [64, 32] by config.json, found [63, 32]"),
    (_integers, "in bf16, fp16, fp32 or fp64, found I8"),
    (_pickled, "never loaded"),
    (_no_config, "found no"),
    (_broken_config, "unreadable"),
    (_list_config, "found a list"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda x: getattr(x, "__name__", None))
def test_damage(tmp_path: Path, damage, message: str) -> None:  # noqa: ANN001
    write_checkpoint(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError) as error:
        Checkpoint.open(tmp_path / "m").describe()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_shard_and_lying_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", shards=3)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00003.safetensors"
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected tensor model.layers.9.extra in model-00001"):
        Checkpoint.open(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="expected 3 shards .* found model-00002-of-00003.safetensors missing"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, value: float) -> None:
    write_checkpoint(tmp_path / "m")
    weight = torch.ones(32, 64)
    weight[3, 5] = value
    _change(tmp_path / "m", "model.layers.2.mlp.down_proj.weight", weight)
    checkpoint = Checkpoint.open(tmp_path / "m")
    model_of = checkpoint.describe()
    checkpoint.read_layer(model_of.layers[1])
    with pytest.raises(UserError, match="found 1 NaN or Inf in model.layers.2.mlp.down_proj.weight"):
        checkpoint.read_layer(model_of.layers[2])
