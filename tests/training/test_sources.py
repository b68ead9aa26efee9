"""Files and data sets as sources: what is read, what is left out, and what fails in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from tulle.errors import UserError
from tulle.training import corpus, sources
from tulle.training.corpus import Corpus, prepare
from tulle.training.recipe import Source, TextData
from tulle.training.sources import index
from tulle.training.tokenizer import save_tokenizer, train_tokenizer


def jsonl(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_rows_of_a_jsonl_file_by_key_and_by_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "één"}, {"content": "two\nlines"}, {"text": "  "}])
    assert [d.text for d in index(Source(path=path), tmp_path)] == ["één", "two\nlines"]
    path = jsonl(tmp_path / "b.jsonl", [{"q": "1+1?", "a": 2}, {"q": "2+2?", "a": 4}])
    found = index(Source(path=path, template="{q} = {a}"), tmp_path)
    assert [d.text for d in found] == ["1+1? = 2", "2+2? = 4"]
    assert [d.text for d in index(Source(path=path, template="{q}", documents=1), tmp_path)] == ["1+1?"]


def test_a_mark_of_utf8_and_strange_line_ends(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"text": "one\u2028line\u0085"}\n'.encode())
    assert [d.text for d in index(Source(path=str(file)), tmp_path)] == ["one\u2028line\u0085"]


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_text_files_whatever_the_size_of_a_read(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sources, "PIECE", piece)
    text = "first é\n---\nsecond\n\n---\nthird"
    (tmp_path / "a.txt").write_text(text)
    found = index(Source(path=str(tmp_path / "a.txt"), separator="---\n"), tmp_path)
    assert [d.text for d in found] == ["first é\n", "second\n\n", "third"]
    # Without a separator: pieces that end with a line, which joined are the file.
    pieces = [d.text for d in index(Source(path=str(tmp_path / "a.txt")), tmp_path)]
    assert "".join(pieces) == text and len(pieces) == (3 if piece == 7 else 1)
    assert all(part.endswith("\n") for part in pieces[:-1])


def test_folders_are_read_in_order_and_offsets_stay_right(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\xff")
    assert [d.text for d in index(Source(path=str(tmp_path)), tmp_path)] == ["first", "second"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: {"path": str(f / "none.txt")}, "found nothing at"),
        (lambda f: {"path": jsonl(f / "a.jsonl", [{"body": "x"}])}, "expected text or content in every row.*body"),
        (lambda f: {"path": jsonl(f / "a.jsonl", [{"q": "x"}]), "template": "{z}"}, "template's keys in a.jsonl"),
        (lambda f: {"path": jsonl(f / "a.jsonl", [[1]])}, "expected an object in every row"),
        (lambda f: {"path": str((f / "a.txt", (f / "a.txt").write_bytes(b"\xff\xfe"))[0])}, "expected UTF-8"),
        (lambda f: {"path": str((f / "a.txt", (f / "a.txt").write_text(" \n"))[0])}, "found none"),
        (lambda f: {"path": str((f / "a.jsonl", (f / "a.jsonl").write_text("{"))[0])}, "expected JSON"),
    ],
)
def test_bad_sources_fail_in_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        index(Source(**make(tmp_path)), tmp_path)
    assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_fails_at_once_offline(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="the data set 'owner/name'.*HF_HUB_OFFLINE is set; name a file"):
        index(Source(dataset="owner/name"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_streamed_once_and_then_read_from_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": f"row {i}", "n": i} for i in range(10)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    source = Source(dataset="owner/name", config="c", split="s", documents=3)
    for _ in range(2):
        assert [d.text for d in index(source, tmp_path)] == ["row 0", "row 1", "row 2"]
    assert calls == [("owner/name", "c", "s", True)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A model folder's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["abc " * 50], 257 + 3), folder, context=16)
    return folder


def decode(made: Corpus, stream: np.ndarray) -> list[str]:
    """The documents of a packed stream."""
    cuts = [i for i, token in enumerate(stream) if token == made.vocabulary.end]
    decoder = made.vocabulary.tokenizer
    return [decoder.decode(stream[a + 1 : b].tolist()) for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize("own", [True, False], ids=["trained on the documents", "a model's tokenizer"])
def test_weighted_sources_are_packed_and_held_out_text_is_left_out(tmp_path, tokenizer, monkeypatch, own):
    monkeypatch.setattr(corpus, "CHUNK", 3)
    first = jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(8)])
    second = jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(4)])
    held = jsonl(tmp_path / "h.jsonl", [{"text": "a3"}, {"text": "h"}])
    data = TextData(sources=[Source(path=first), Source(path=second, weight=3)], held_out=[Source(path=held)])
    made, again, other = (prepare(data, seed, tmp_path / "cache", 257 if own else tokenizer) for seed in (0, 0, 1))
    expected = [f"a{i}" for i in range(8) if i != 3] + 3 * [f"b{i}" for i in range(4)]
    found = decode(made, made.train)
    assert sorted(found) == sorted(expected) and found != expected
    assert decode(made, made.held_out) == ["a3", "h"] and made.held_out_bytes == 3
    assert made.vocabulary.tokenizer.get_vocab_size() == (257 if own else 260)
    assert (again.train == made.train).all()
    assert sorted(decode(other, other.train)) == sorted(expected)
    assert decode(other, other.train) != found


@pytest.mark.parametrize("given", [{}, {"name": "a", "path": "b"}])
def test_a_source_is_one_thing(given):
    with pytest.raises(ValueError, match="exactly one of name, path and dataset"):
        Source(**given)
