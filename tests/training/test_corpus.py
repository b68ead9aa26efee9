"""The tokenizer is lossless; the order of windows depends on the seed alone."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from tulle.errors import UserError
from tulle.text.standard_library import calibration_text, held_out_text
from tulle.training.corpus import Windows
from tulle.training.tokenizer import END_OF_TEXT, own_vocabulary, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(calibration_text()[:60], 1024)


def test_round_trip_on_held_out_text_and_on_any_bytes(tokenizer):
    for text in [*held_out_text()[:8], "a\tb\r\n  é 🜁 \x00", "", "    ", "\n\n\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_newline_and_indentation_are_one_token(tokenizer):
    tokens = tokenizer.encode("if x:\n        return y").tokens
    assert tokens[-3:-1] == ["ĊĠĠĠĠĠĠĠ", "Ġreturn"]


def test_loads_with_transformers(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, context=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = held_out_text()[0]
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token == END_OF_TEXT and loaded.eos_token_id == 0
    assert loaded.model_max_length == 64


def test_documents_are_separated(tokenizer):
    stream = own_vocabulary(tokenizer).encode(["x = 1", "y"])
    assert stream.dtype == np.uint16
    assert [i for i, token in enumerate(stream) if token == 0] == [0, len(stream) - 1 - 2, len(stream) - 1]


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(UserError, match="expected text enough for 5000 tokens"):
        train_tokenizer(["abc"], 5000)


def test_windows_visit_each_once_per_epoch_and_overlap_by_one():
    stream = np.arange(1001, dtype=np.uint16)
    windows = Windows(stream, context=10, seed=3)
    epochs = windows.batch(0, 200)
    assert epochs.shape == (200, 11)
    for epoch in (epochs[:100], epochs[100:]):
        assert sorted(epoch[:, 0]) == list(range(0, 1000, 10))
    assert (np.diff(epochs) == 1).all()
    assert (epochs[:100] != epochs[100:]).any()


def test_window_order_depends_on_position_alone():
    stream = np.arange(1001, dtype=np.uint16)
    whole = Windows(stream, context=10, seed=3).batch(0, 150)
    parts = Windows(stream, context=10, seed=3)
    assert (np.concatenate([*Windows(stream, context=10, seed=3).batches(2, 5, size=30)]) == whole[60:150]).all()
    # Out of order, as after a resume.
    assert (parts.batch(90, 60) == whole[90:]).all()
    assert (parts.batch(0, 90) == whole[:90]).all()
    assert (Windows(stream, context=10, seed=4).batch(0, 150) != whole).any()


def test_too_short_a_stream():
    with pytest.raises(UserError, match="at least 11 training tokens, found 10"):
        Windows(np.zeros(10, np.uint16), context=10, seed=0)
