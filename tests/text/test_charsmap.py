"""The check of SentencePiece's table of characters: what passes never panics in the library."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from tulle.errors import UserError
from tulle.text.charsmap import check_charsmap
from tulle.text.tokenizer_folder import read_tokenizer

PAIRS = {"ﬁ": "fi", "①": "1", "Ａ": "A"}
TEXTS = ["", "ﬁne ①Ａ", "plain", "敏捷的", "".join(map(chr, range(1, 0x250))), "a\0b"]


def charsmap(pairs: dict[str, str], blocks: int = 32) -> bytes:
    """A double array in which every state has a block of 256 units."""
    units, replacements, taken = [0] * (256 * blocks), b"", 1
    units[0] = 256 << 10
    for key, value in pairs.items():
        state = 256
        for number, byte in enumerate(encoded := key.encode()):
            place = state ^ byte
            if units[place] == 0:
                taken += 1
                units[place] = (256 * taken ^ place) << 10 | byte
            state = place ^ (units[place] >> 10)
            if number == len(encoded) - 1:
                units[place] |= 1 << 8
                units[state] = len(replacements) | 1 << 31
        replacements += value.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements


def try_texts(table: bytes) -> list[str]:
    normalizer = normalizers.Precompiled(table)
    return [normalizer.normalize_str(text) for text in TEXTS]


def test_a_table_is_walked_as_the_library_does() -> None:
    table = charsmap(PAIRS)
    check_charsmap(table)
    assert try_texts(table)[1] == "fine 1A"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "without a size"),
        (b"\0\0\0\0", "of 0 bytes"),
        (b"abcd", "bytes in 4"),
        (struct.pack("<II", 4, 0), "beyond its end"),
        (charsmap(PAIRS)[:-3] + b"\xff\0", "no UTF-8"),
        (struct.pack("<I256I", 1024, 256 << 10, *[0] * 255), "beyond its end"),
    ],
)
def test_broken_tables(table: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_charsmap(table)


@given(st.lists(st.tuples(st.integers(0, 4 * 256 * 12), st.integers(0, 7)), min_size=1, max_size=12))
def test_what_passes_does_not_panic(flips: list[tuple[int, int]]) -> None:
    table = bytearray(charsmap(PAIRS, blocks=12))
    for place, bit in flips:
        table[place % len(table)] ^= 1 << bit
    try:
        check_charsmap(bytes(table))
    except ValueError:
        return
    try_texts(bytes(table))


def test_a_tokenizer_file_with_a_broken_table(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap(PAIRS)), normalizers.NFC()])
    content = json.loads(tokenizer.to_str())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    assert read_tokenizer(tmp_path) is not None
    content["normalizer"]["normalizers"][0]["precompiled_charsmap"] = base64.b64encode(bytes(4)).decode()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="table of characters of 0 bytes"):
        read_tokenizer(tmp_path)
