"""What the fuzzers (fuzz/) found in the readers of models: each case is refused in one line, in no time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tulle.errors import LONGEST, UserError
from tulle.models.description import Rotary, describe
from tulle.models.gguf.config import config_of
from tulle.models.gguf.families import family_of
from tulle.models.gguf.file import GgufFile
from tulle.models.gguf.names import ROPE
from tulle.models.gguf.tokenizer import tokenizer_of
from tulle.models.rotary import frequencies
from tulle.models.source import open_source

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 24,
}  # fmt: skip


def test_a_message_is_one_line_that_a_terminal_can_print() -> None:
    message = str(UserError("expected a,\nfound \x1b[31mb\u2028c\ud800\x00"))
    assert message == "expected a, found \\x1b[31mb c\\ud800\\x00"
    message.encode()
    long = str(UserError("a" * 10**6 + "b"))
    assert len(long) < LONGEST + 10 and long.endswith("b")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 10**400},
        {"hidden_size": 2 * 10**400},
        {"max_position_embeddings": 10**400},
        {"rms_norm_eps": 10**400},
        {"rope_theta": 10**400},
    ],
)
def test_numbers_that_no_model_has(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        describe(LLAMA | change)


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(2, 1e4, kind="dynamic", max_positions=64, factor=2.0),
        Rotary(8, 1.0, kind="yarn", max_positions=64, factor=2.0),
        Rotary(8, 1e4, kind="yarn", max_positions=64, factor=2.0, beta_fast=1e308),
        Rotary(8, 1e4, kind="longrope", max_positions=64, original_max_positions=1, short_factor=(1.0,) * 4,
               long_factor=(1.0,) * 4),
        Rotary(8, 1e4, kind="linear", max_positions=64, factor=1e-320),
    ],
)  # fmt: skip
def test_rope_parameters_that_give_no_frequencies(rotary: Rotary) -> None:
    with pytest.raises(UserError, match="frequencies"):
        frequencies(rotary, 128)


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "../x.safetensors", "/x", "a" * 5000])
def test_names_of_shards_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="expected"):
        open_source(tmp_path)


def gguf(shape: tuple[int, ...]) -> bytes:
    entry = struct.pack("<Q", 1) + b"t" + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + struct.pack("<IQ", 0, 0) + bytes(200)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 1 << 60)])
def test_gguf_tensors_without_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf(shape))
    with pytest.raises(UserError, match="above 0"):
        GgufFile(tmp_path / "x.gguf")


GGUF = {
    "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 32, "llama.block_count": 1, "llama.attention.head_count": 2,
}  # fmt: skip


@pytest.mark.parametrize("found", [["1", "2"], [["1"]], np.array([0.5]), "2", 0])
def test_gguf_sizes_of_other_kinds(found: object) -> None:
    with pytest.raises(UserError, match="head_count"):
        config_of(GGUF | {"llama.attention.head_count": found}, 10, ())
    assert config_of(GGUF | {"llama.attention.head_count": np.array([2, 2])}, 10, ())["num_attention_heads"] == 2


def test_gguf_heads_that_are_wider_than_their_frequencies() -> None:
    """Of a table of 8 numbers, nothing of 2^40 channels is made."""
    lie = GGUF | {f"llama.{key}": 1 << 40 for key in ("attention.key_length", "attention.value_length")}
    lie |= {"llama.rope.dimension_count": 1 << 40}
    with pytest.raises(UserError, match="numbers in rope_freqs"):
        config_of(lie, 10, (), {ROPE: np.full(8, 2, np.float32)})


@pytest.mark.parametrize("architecture", [["llama"], None, 3])
def test_gguf_architectures_of_other_kinds(architecture: object) -> None:
    with pytest.raises(UserError, match="architecture"):
        family_of({"general.architecture": architecture})


@pytest.mark.parametrize(
    "change",
    [{"token_type": ["a"] * 3}, {"token_type": 0.5}, {"scores": 1}, {"scores": ["a"] * 3}, {"tokens": "abc"}],
)
def test_gguf_tokenizers_of_other_kinds(change: dict[str, Any]) -> None:
    tables = {"model": "llama", "tokens": ["<unk>", "a", "b"], "scores": [0.0, -1.0, -2.0]}
    whole = {f"tokenizer.ggml.{key}": value for key, value in tables.items()}
    assert tokenizer_of(whole).tokenizer.get_vocab_size() == 3
    with pytest.raises(UserError):
        tokenizer_of(whole | {f"tokenizer.ggml.{key}": value for key, value in change.items()})
