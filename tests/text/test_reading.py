"""Texts and token sequences."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from checkpoints import write_tokenizer
from tulle.errors import UserError
from tulle.text.reading import Text, read_text, sequences


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_separator_cuts_strips_and_selects(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text(" one \n<|end|>\ntwo\n<|end|>  <|end|>three<|end|>four")
    text = read_text([file], separator="<|end|>")
    assert text.documents == ("one", "two", "three", "four") and text.separate
    assert read_text([file], "<|end|>", min_chars=4).documents == ("three", "four")
    assert read_text([file], "<|end|>", documents=(1, 3), min_chars=4).documents == ("four",)


def test_jsonl_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("x", "y")) + "\n\n")
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read_text([tmp_path / "b.jsonl"]) == Text(("x", "y"), True, ("b.jsonl",))
    assert read_text([tmp_path]).documents == ("plain", "x", "y")
    assert read_text([tmp_path / "a.txt"]) == Text(("plain",), False, ("a.txt",))


def test_strange_line_ends_inside_rows(tmp_path: Path) -> None:
    """Only a line feed ends a row."""
    texts = ["a\u2028b", "c\u2029d", "e\u0085f", "g\x0bh\x0ci\x1cj", "k\nl\rm"]
    file = tmp_path / "rows.jsonl"
    for end in ("\n", "\r\n", "\n\n"):
        for mark in ("", "\ufeff"):
            rows = (json.dumps({"text": t}, ensure_ascii=False).replace("\\u0085", "\u0085") for t in texts)
            file.write_bytes((mark + end.join(rows)).encode())
            assert read_text([file]).documents == tuple(texts)
    file.write_bytes(b'{"text": "a"}\n{"text": "b}\n')
    with pytest.raises(UserError, match="line 2"):
        read_text([file])


def test_a_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffnaïve\r\n\u2028x".encode())
    assert read_text([file]).documents == ("naïve\n\u2028x",)
    file.write_bytes("naïve".encode("utf-16"))
    with pytest.raises(UserError, match="expected UTF-8 text"):
        read_text([file])


def test_documents_are_cut_at_the_length_and_never_joined(tokenizer) -> None:  # noqa: ANN001
    found = sequences(Text.of(["abcdefgh", "xyz", "pq"]), tokenizer, 4)
    assert [tokenizer.decode(s) for s in found] == ["abcd", "xyz", "pq"]
    assert len(sequences(Text.of(["abcdefgh", "xyz", "pq"]), tokenizer, 4, samples=2)) == 2


def test_stream_windows_do_not_overlap_and_the_draw_is_seeded(tokenizer) -> None:  # noqa: ANN001
    text = Text(("".join(chr(97 + i % 26) for i in range(103)),), False)
    every = sequences(text, tokenizer, 10)
    assert "".join(tokenizer.decode(s) for s in every) == text.documents[0][:100]
    drawn = [tokenizer.decode(s) for s in sequences(text, tokenizer, 10, samples=4, seed=1)]
    assert len(set(drawn)) == 4 and set(drawn) <= {tokenizer.decode(s) for s in every}
    assert drawn == [tokenizer.decode(s) for s in sequences(text, tokenizer, 10, samples=4, seed=1)]
    assert drawn != [tokenizer.decode(s) for s in sequences(text, tokenizer, 10, samples=4, seed=2)]


def test_a_long_text_is_not_tokenized_whole(tokenizer) -> None:  # noqa: ANN001
    """Two windows of ten tokens come from at most 2·10·16 characters, drawn by the seed, of one document or many."""
    one = Text(("".join(chr(97 + i * i % 26) for i in range(100_000)),), False)
    many = Text(tuple(f"{i:04d} " * 20 for i in range(1000)), False)
    for text in (one, many):
        seen: list[int] = []

        def counting(content: str, seen: list[int] = seen) -> dict:
            seen.append(len(content))
            return tokenizer(content)

        first = sequences(text, counting, 10, samples=2, seed=0)
        assert len(first) == 2 and all(len(s) == 10 for s in first)
        assert seen[0] <= 2 * 10 * 16 + 2 * len(text.documents)
        joined = "\n\n".join(text.documents)
        assert all(tokenizer.decode(s).strip() in joined for s in first[:1])
        assert [s.tolist() for s in first] != [s.tolist() for s in sequences(text, tokenizer, 10, samples=2, seed=1)]


def test_too_short(tokenizer) -> None:  # noqa: ANN001
    with pytest.raises(UserError, match="expected 8 windows of 10 tokens of calibration text, found 2"):
        sequences(Text(("a" * 25,), False), tokenizer, 10, samples=8)
    with pytest.raises(UserError, match="expected 1 windows .* found 0; give more text"):
        sequences(Text(("a" * 5,), False), tokenizer, 10)
    with pytest.raises(UserError, match="expected 3 documents .* found 2"):
        sequences(Text.of(["aa", "bb"]), tokenizer, 10, samples=3)


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, message in [
        ("empty.txt", "expected text in"),
        ("latin.txt", "expected UTF-8"),
        ("rows.jsonl", "expected a text or content string in line 2"),
        ("broken.jsonl", "expected JSON in line 2"),
        ("none", "expected files ending in"),
        ("absent.txt", "found nothing at"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            read_text([tmp_path / source])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="data set 'wikitext'.*HF_HUB_OFFLINE is set"):
        read_text(["wikitext"])
