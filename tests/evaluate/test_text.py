"""The protocol: which tokens are scored, and how many bytes of text they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigram import byte_tokenizer
from tulle.errors import UserError
from tulle.evaluate.text import Protocol, describe, passages, read_documents, resolve_length
from tulle.text.reading import Text

PLAIN, BOS = byte_tokenizer(False), byte_tokenizer(True)


def stream(text: str) -> Text:
    return Text((text,), False, ("test",))


def test_whole_documents_count_all_their_bytes_after_bos() -> None:
    documents = ["plain", "größer — 漢字", "trailing space  "]
    found = passages(Text.of(documents), BOS, Protocol(), 64)
    assert [p.bytes for p in found] == [len(d.encode()) for d in documents]
    assert all(p.ids[0] == BOS.bos_token_id for p in found)


def test_without_bos_the_first_token_is_context_and_its_bytes_do_not_count() -> None:
    (found,) = passages(Text.of(["abcdef"]), PLAIN, Protocol(), 64)
    assert (len(found.ids), found.bytes) == (6, 5)
    (found,) = passages(Text.of(["abcdef"]), BOS, Protocol(bos=False), 64)
    assert (len(found.ids), found.bytes) == (6, 5)


def test_a_cut_document_counts_the_bytes_of_its_scored_tokens() -> None:
    (found,) = passages(Text.of(["abcdefghij"]), BOS, Protocol(), 4)
    assert (len(found.ids), found.bytes) == (4, 3)  # BOS, a, b, c


def test_a_character_that_the_cut_falls_into_does_not_count() -> None:
    (found,) = passages(Text.of(["a漢b"]), BOS, Protocol(), 4)  # BOS, a, two of the three bytes of 漢
    assert (len(found.ids), found.bytes) == (4, 1)
    (found,) = passages(Text.of(["a漢b"]), BOS, Protocol(), 5)
    assert (len(found.ids), found.bytes) == (5, 4)


def test_stream_windows_do_not_overlap_and_a_short_last_one_is_dropped() -> None:
    found = passages(stream("abcdefghijk"), PLAIN, Protocol(), 4)
    assert [PLAIN.decode(p.ids) for p in found] == ["abcd", "efgh"]
    assert [p.bytes for p in found] == [3, 3]
    (only,) = passages(stream("abc"), PLAIN, Protocol(), 4)
    assert (PLAIN.decode(only.ids), only.bytes) == ("abc", 2)


def test_whole_documents_go_on_in_further_windows() -> None:
    found = passages(Text.of(["abcdefghij", "xy"]), BOS, Protocol(whole=True), 4)
    assert [BOS.decode(p.ids, skip_special_tokens=True) for p in found] == ["abc", "defg", "hij", "xy"]
    assert [p.bytes for p in found] == [3, 3, 2, 2]


@settings(max_examples=30)
@given(st.text(min_size=2, max_size=30), st.integers(2, 9))
def test_windows_never_count_a_byte_twice(text: str, length: int) -> None:
    windows = passages(Text.of([text]), BOS, Protocol(whole=True), length)
    total = len(text.encode())
    later = -(-(total + 1) // length) - 1  # windows after the first: one token per byte, and BOS
    counted = sum(w.bytes for w in windows)
    # Not counted: what each later window's first token completes, nothing or a character of at most 4 bytes.
    assert total - 4 * later <= counted <= total
    if text.isascii():
        assert counted == total - later


def test_merged_tokens_count_all_their_characters() -> None:
    tokenizer = byte_tokenizer(True, merges=(("a", "b"), ("ab", "c")))
    (found,) = passages(Text.of(["abcabd"]), tokenizer, Protocol(), 3)  # BOS, abc, ab
    assert (len(found.ids), found.bytes) == (3, 5)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(UserError, match="two tokens or more"):
        passages(Text.of(["a"]), PLAIN, Protocol(), 8)


@pytest.mark.parametrize(("length", "context", "expected"), [(None, 512, 512), (None, None, 2048), (64, 128, 64)])
def test_length(length: int | None, context: int | None, expected: int) -> None:
    assert resolve_length(length, context) == expected


@pytest.mark.parametrize("length", [0, 1, 129])
def test_length_beyond_the_context_is_refused(length: int) -> None:
    with pytest.raises(UserError, match="length from 2 to the model's context \\(128 tokens\\)"):
        resolve_length(length, 128)


def test_protocol_line_states_the_selection(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("first story|no|second story |third story")
    text = read_documents(str(file), "|", (1, 3), 5)
    assert text.documents == ("second story", "third story")
    line = describe(text, Protocol(), 64, 2, True)
    for part in (
        "stories.txt",
        "cut at '|'",
        "at least 5 characters",
        "documents 1:3",
        "2 documents",
        "64 tokens",
        "BOS first",
    ):
        assert part in line
