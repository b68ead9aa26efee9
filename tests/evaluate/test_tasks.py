"""Multiple choice by log-likelihood, against a model whose probabilities are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bigram import Bigram, byte_tokenizer
from tulle.errors import UserError
from tulle.evaluate import evaluate_task
from tulle.evaluate.harness import check_task_name
from tulle.evaluate.tasks import encode_pair, read_examples

TOKENIZER = byte_tokenizer(True)


def spells(*words: str) -> Bigram:
    """A model that likes the letter pairs of these words."""
    model = Bigram(257)
    logits = torch.zeros(257, 257)
    for word in words:
        ids = TOKENIZER(" " + word)["input_ids"]
        for a, b in zip(ids, ids[1:], strict=False):
            logits[a, b] = 12.0
    model.table = logits.log_softmax(-1)
    return model


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_multiple_choice(tmp_path: Path) -> None:
    rows = [
        {"query": "The sky is", "choices": ["blue", "xqzk"], "gold": 0},
        {"query": "Grass is", "choices": ["zzqx", "green"], "gold": 1},
        {"query": "Snow is", "choices": ["blue", "wqwq"], "gold": 1},
    ]
    found = evaluate_task(spells("blue", "green"), TOKENIZER, write(tmp_path / "colours.jsonl", *rows))
    assert found["task"] == "colours"
    assert found["examples"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))


def test_one_row_has_no_standard_error(tmp_path: Path) -> None:
    row = {"query": "The sky is", "choices": ["blue", "xqzk"], "gold": 0}
    found = evaluate_task(spells("blue"), TOKENIZER, write(tmp_path / "sky.jsonl", row))
    assert (found["accuracy"], found["accuracy_stderr"], found["accuracy_norm_stderr"]) == (1.0, None, None)


def test_length_normalisation_does_not_favour_short_choices(tmp_path: Path) -> None:
    # "green" has likely pairs only; "x" is one unlikely letter, so its sum is greater, but not per byte.
    model = spells("green")
    model.table = model.table.clamp(min=-6.0)
    model.table[TOKENIZER(" ")["input_ids"][0]] = -7.0
    model.table[TOKENIZER("r")["input_ids"][0], TOKENIZER("e")["input_ids"][0]] = -2.0
    row = {"query": "Grass is", "choices": ["green", "x"], "gold": 0}
    found = evaluate_task(model, TOKENIZER, write(tmp_path / "t.jsonl", row))
    assert (found["accuracy"], found["accuracy_norm"]) == (0.0, 1.0)


def test_context_options_score_the_continuation_only(tmp_path: Path) -> None:
    # The context "qqqq" is unlikely in itself, but the continuation is likely after its last letter.
    tokenizer = byte_tokenizer(True, merges=(("Ġ", "y"),))
    q, y, _ = tokenizer("q y")["input_ids"][0], *tokenizer(" ya")["input_ids"]
    model = Bigram(258)
    model.table[q, q] = -50.0
    model.table[:, y] = -9.0
    model.table[q, y] = -0.1
    row = {"context_options": ["fine", "qqqq"], "continuation": "yes", "gold": 1}
    assert evaluate_task(model, tokenizer, write(tmp_path / "w.jsonl", row))["accuracy"] == 1.0


def test_last_word_is_right_if_greedy(tmp_path: Path) -> None:
    rows = [{"context": "say", "continuation": "blue"}, {"context": "say", "continuation": "bleu"}]
    model = spells("blue")
    model.table[TOKENIZER(" ")["input_ids"][0], TOKENIZER("b")["input_ids"][0]] = -0.01
    found = evaluate_task(model, TOKENIZER, write(tmp_path / "last.jsonl", *rows))
    assert (found["accuracy"], found["accuracy_norm"]) == (0.5, None)


def test_hellaswag_rows_are_multiple_choice(tmp_path: Path) -> None:
    row = {"ctx": "a", "endings": ["b", "c"], "label": 1, "ind": 4}
    (example,) = read_examples(write(tmp_path / "h.jsonl", row))
    assert (example.pairs, example.gold) == ((("a", "b"), ("a", "c")), 1)


def test_limit_reads_the_first_rows(tmp_path: Path) -> None:
    rows = [{"context": "a", "continuation": str(i)} for i in range(5)]
    file = write(tmp_path / "t.jsonl", *rows)
    assert [e.pairs[0][1] for e in read_examples(file, 2)] == ["0", "1"]


def test_a_long_context_is_cut_from_the_left() -> None:
    ids, context = encode_pair("abcdefgh", "xy", TOKENIZER, 6)
    assert ids[0] == TOKENIZER.bos_token_id
    assert (TOKENIZER.decode(ids[1:context]), TOKENIZER.decode(ids[context:])) == ("gh ", "xy")


@pytest.mark.parametrize(
    "row",
    [
        {"query": "a", "choices": ["b", "c"], "gold": 2},
        {"query": "a", "choices": ["b"], "gold": 0},
        {"query": "a", "choices": ["b", ""], "gold": 0},
        {"query": "a", "choices": ["b", "c"]},
        {"text": "a"},
        ["not", "an", "object"],
        {"context": "a", "continuation": 3},
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any) -> None:
    file = write(tmp_path / "t.jsonl", {"context": "a", "continuation": "b"}, row)
    with pytest.raises(UserError, match="line 2"):
        read_examples(file)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        read_examples(write(tmp_path / "t.jsonl"))


def test_a_named_task_needs_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tulle\[tasks\]'"):
        check_task_name("arc_easy")


def test_a_named_task_needs_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="arc_easy"):
        check_task_name("arc_easy")


def test_rows_hold_strange_line_ends_and_files_a_mark_of_utf8(tmp_path: Path) -> None:
    row = {"query": "The\u2028cat", "choices": ["sat\u0085", "flew"], "gold": 0}
    file = tmp_path / "task.jsonl"
    file.write_bytes(("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\r\n").encode())
    (example,) = read_examples(file)
    assert example.pairs == (("The\u2028cat", "sat\u0085"), ("The\u2028cat", "flew"))
    file.write_bytes(b'{"query": "na\xefve"}')
    with pytest.raises(UserError, match="expected UTF-8 text"):
        read_examples(file)
