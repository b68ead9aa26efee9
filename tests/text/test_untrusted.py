"""What the fuzzers (fuzz/) found in the readers of tokenizers: each case is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from tulle.errors import UserError
from tulle.text import sentencepiece
from tulle.text.sentencepiece import parse
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tokenizer_folder import read_tokenizer

TOKENIZER = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("special_tokens_map.json", {"extra_special_tokens": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
        ("generation_config.json", {"eos_token_id": [[2]]}),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    read_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer files"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_that_is_no_utf8(tmp_path: Path) -> None:
    """The library ended the whole process: bytes that are no UTF-8 in the message of its own error."""
    text = json.dumps(TOKENIZER | {"decoder": {"type": "XXXX"}}).encode()
    (tmp_path / "tokenizer.json").write_bytes(text.replace(b"XXXX", b"\xed\xa0\x80"))
    with pytest.raises(UserError, match="tokenizer.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("merges", [["a é"], [["a", "é"]], ["a"], [5], [["a", None]]])
def test_a_prefix_that_merges_lack(tmp_path: Path, merges: list[Any]) -> None:
    """The library cut é in two, and ended the whole process when it said so."""
    model = TOKENIZER["model"] | {"vocab": {"a": 0, "é": 1}, "continuing_subword_prefix": "#", "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"model": model}))
    with pytest.raises(UserError, match="tokenizer.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("merges", [[["a", "é"]], ["a é"], [["aé", "a"]], [[1, 2]], [{}]])
def test_a_merge_that_makes_no_token(tmp_path: Path, merges: list[Any]) -> None:
    """The library panicked where the merge was longer than all tokens."""
    model = TOKENIZER["model"] | {"vocab": {"a": 0, "é": 1}, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"model": model}))
    with pytest.raises(UserError, match="tokenizer.json"):
        read_tokenizer(tmp_path)


def test_a_prefix_of_merges(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "#é": 1, "aé": 2}
    model = TOKENIZER["model"] | {"vocab": vocabulary, "continuing_subword_prefix": "#", "merges": [["a", "#é"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"model": model}))
    assert read_tokenizer(tmp_path).encode("aé") == [2]


def test_an_unknown_token_that_is_none() -> None:
    tokenizer = Tokenizer(models.Unigram([("a", -1.0)], None, False))
    with pytest.raises(UserError, match="encodes any text"):
        ModelTokenizer(tokenizer).encode("abc")


@pytest.mark.parametrize("piece", [b"\x0a\x01a\x10\x05", b"\x0a\x01a\x1a\x01a", b"\x08\x05"])
def test_sentencepiece_fields_of_other_kinds(piece: bytes) -> None:
    assert len(parse(b"\x0a\x03\x0a\x01a").pieces) == 1
    with pytest.raises(UserError, match="SentencePiece"):
        parse(b"\x0a" + bytes([len(piece)]) + piece)


def test_a_sentencepiece_model_with_a_broken_table() -> None:
    """The library's error was raw (found by the fuzzer)."""
    data = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\x12\x04\x18\x01\x40\x00\x1a\x06\x12\x04abcd"
    model = sentencepiece.parse(data)
    assert model.charsmap == b"abcd"
    with pytest.raises(UserError, match="table of characters"):
        sentencepiece.tokenizer_of(model)
