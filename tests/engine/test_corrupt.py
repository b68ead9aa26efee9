"""Packed files are untrusted: a damaged one runs or is refused with one line, and nothing else happens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corruption import BLOCKS4, SCHEMES, by_size_and_mtime, damaged, try_model

from tiny_models import write_model
from tulle.engine.checkpoint import Checkpoint
from tulle.engine.files import TensorWriter
from tulle.engine.native_model import Layout, LinearFacts, WeightKind
from tulle.errors import UserError
from tulle.models.tensor_file import TensorFile


@pytest.fixture(autouse=True, scope="module")
def copies_are_the_same_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "identity", by_size_and_mtime)
        yield


def written(factory: pytest.TempPathFactory, layout: str) -> Path:
    folder = factory.mktemp("packed") / "model"
    write_model(folder, SCHEMES[layout], dtype="bfloat16")
    assert try_model(folder, layout) == "ran"
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory, "sparse")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {layout: written(tmp_path_factory, layout) for layout in SCHEMES}


@pytest.mark.parametrize("layout", SCHEMES)
@pytest.mark.parametrize("part", range(8))
def test_random_damage(models: dict[str, Path], layout: str, part: int, tmp_path: Path) -> None:
    choice = random.Random(part)
    seen = {"ran": 0, "refused": 0}
    for _ in range(25):
        damaged(models[layout], tmp_path / "model", choice)
        seen["ran" if try_model(tmp_path / "model", layout) == "ran" else "refused"] += 1
    # Some of it hits numbers that may be anything, some of it does not.
    assert seen["refused"] > 0 and seen["ran"] > 0


def test_facts_that_say_one_of_a_group_is_stored_otherwise(tmp_path: Path) -> None:
    """In the engine's own file: q by single inputs, k and v in blocks of 4, all of them of the same size."""
    # 32 rows of k: no whole line
    schemes = SCHEMES["dense input-major"] | {"qkv": {"bits": 8, "input_sparsity": BLOCKS4}}
    write_model(tmp_path / "m", schemes, dtype="bfloat16")
    assert try_model(tmp_path / "m", "input-major") == "ran"
    (file,) = (tmp_path / "m/.engine").glob("*.safetensors")
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["facts"])
    blocks = [name for name, found in facts.items() if found["layout"] == "input_major_blocks4"]
    assert len(blocks) > 3
    for name in blocks:
        changed = facts | {name: facts[name] | {"layout": "input_major"}}
        metadata = header["__metadata__"] | {"facts": json.dumps(changed)}
        text = json.dumps(header | {"__metadata__": metadata}, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        file.write_bytes(whole[:8] + text + whole[8 + length :])
        try_model(tmp_path / "m", "input-major")  # wrong numbers or a refusal, never a read beyond an array


def damage_facts(name: str, value: object) -> dict[str, object]:
    facts: dict[str, object] = LinearFacts(WeightKind.CODES4, Layout.TILES, 16, 64, 64, 1, 1, 8).to_json()
    return facts | {name: value}


def test_facts_are_read_back_or_refused() -> None:
    facts = LinearFacts(WeightKind.CODES4, Layout.SPARSE_INPUT_MAJOR_BLOCKS4, 16, 64, 64, 1, 1, 8)
    assert LinearFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    for name, value in (("kind", "codes7"), ("layout", "rows"), ("rows", True), ("rows", "16"), ("zero", 8.0)):
        assert LinearFacts.from_json(damage_facts(name, value)) is None
    assert LinearFacts.from_json(damage_facts("fours", False)) is None
    assert LinearFacts.from_json([]) is None


def test_a_mask_that_promises_more_values(packed: Path, tmp_path: Path) -> None:
    """In the engine's own file, which is not checked against the packed one."""
    import shutil

    shutil.copytree(packed, tmp_path / "model")
    (file,) = (tmp_path / "model/.engine").glob("*.safetensors")
    found = TensorFile(file)
    name = next(n for n in found.names() if n.endswith("q_proj.masks"))
    data = bytearray(file.read_bytes())
    at, _ = found.extent(name)
    data[at : at + 64] = b"\xff" * 64
    del found
    file.write_bytes(data)
    assert "bytes between two offsets" in try_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_hidden_layers=3), "missing|found none"),
        (lambda c: c.update(hidden_size=128), "shape"),
        (lambda c: c.update(hidden_size=10**9), "expected"),
        (lambda c: c.update(num_attention_heads=3), "expected"),
        (lambda c: c.update(vocab_size=7), "shape"),
        (lambda c: c.update(model_type="gpt5"), "model_type"),
        (lambda c: c.update(hidden_act="tanh"), "hidden_act"),
        (lambda c: c["quantization_config"].update(format_version=9), "format_version"),
        (
            lambda c: c.update(rope_scaling={"rope_type": "yarn"}, rope_parameters={"rope_type": "yarn"}),
            "rope_parameters",
        ),
    ],
)
def test_configs(packed: Path, change: object, message: str, tmp_path: Path) -> None:
    import re
    import shutil

    shutil.copytree(packed, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    change(config)  # type: ignore[operator]
    path.write_text(json.dumps(config))
    assert re.search(message, try_model(tmp_path / "model"))


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"a": np.arange(5, dtype=np.uint8), "b.c": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with TensorWriter(tmp_path / "x.safetensors", 1000) as file:
        for name, array in arrays.items():
            file.add(name, array)
        file.finish({"k": "v"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]
    read = load_file(tmp_path / "x.safetensors")
    mapped = TensorFile(tmp_path / "x.safetensors")
    assert mapped.metadata == {"k": "v"}
    for name, array in arrays.items():
        assert np.array_equal(read[name], array) and np.array_equal(mapped.tensor(name), array)
        assert mapped.tensor(name).ctypes.data % 64 == 0
        assert mapped.tensor(name).dtype == array.dtype


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TensorWriter(tmp_path / "x.safetensors", 100) as file:
        file.add("a", np.zeros(3, np.uint8))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 8, (10).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
    + [
        len(h).to_bytes(8, "little") + h + bytes(16)
        for h in (
            b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        )
    ],
)  # fmt: skip
def test_broken_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="expected"):
        TensorFile(tmp_path / "x.safetensors")
