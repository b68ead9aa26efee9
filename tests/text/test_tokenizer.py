"""A model's tokenizer, and streams of text with stop strings."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_in_memory import KINDS, SCRIPTS, byte_level, tokenizer_of_kind

from tulle.errors import UserError
from tulle.text.tokenizer import ModelTokenizer


def streamed(
    tokenizer: ModelTokenizer, prompt: list[int], tokens: list[int], stop: list[str], keep_special: bool = False
) -> tuple[str, bool, int]:
    """The text, whether it stopped, and after how many tokens."""
    stream, pieces = tokenizer.stream(prompt, stop, keep_special), []
    for number, token in enumerate(tokens, 1):
        pieces.append(stream.add(token))
        if stream.stopped:
            return "".join(pieces), True, number
    pieces.append(stream.finish())
    return "".join(pieces), stream.stopped, len(tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), keep_special=st.booleans())
def test_text_ends_before_the_first_stop_string(kind: str, data: st.DataObject, keep_special: bool) -> None:
    tokenizer = ModelTokenizer(tokenizer_of_kind(kind))
    ids = tokenizer.encode(data.draw(st.sampled_from(SCRIPTS)))
    for token in data.draw(st.lists(st.sampled_from(["<s>", "<|im_end|>", "<think>"]), max_size=3)):
        ids.insert(data.draw(st.integers(0, len(ids))), tokenizer.tokenizer.token_to_id(token))
    cut = data.draw(st.integers(0, len(ids)))
    whole, _, _ = streamed(tokenizer, ids[:cut], ids[cut:], [], keep_special)
    known = tokenizer.decode(ids[:cut], keep_special)
    both = tokenizer.decode(ids, keep_special)
    assert whole == both[len(os.path.commonprefix([known, both])) :]
    stops = ["never in there"]
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 8))])
    found, stopped, _ = streamed(tokenizer, ids[:cut], ids[cut:], stops, keep_special)
    places = [whole.index(s) for s in stops if s in whole]
    assert (found, stopped) == (whole[: min(places)], True) if places else (whole, False)


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (["<|im_end|>"], "one", 4),
        (["<|im_end|>\n"], "one", 5),
        (["ne<|im_end|>"], "o", 4),
        (["\nt", "<|im_end|>"], "one", 4),
        (["<think>"], "one\ntwo", 9),
        (["im_end"], "one\ntwo<think>", 9),
        (["<|im_end|>two"], "one\ntwo<think>", 9),
        ([""], "one\ntwo<think>", 9),
    ],
)  # fmt: skip
def test_a_special_token_may_stop(stop: list[str], text: str, tokens: int) -> None:
    tokenizer = ModelTokenizer(byte_level())
    single = {c: tokenizer.tokenizer.token_to_id(c) for c in "onetw"} | {"\n": tokenizer.tokenizer.token_to_id("Ċ")}
    added = {t: tokenizer.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<think>")}
    ids = [*map(single.__getitem__, "one"), added["<|im_end|>"], *map(single.__getitem__, "\ntwo"), added["<think>"]]
    found, stopped, count = streamed(tokenizer, [], ids, stop)
    assert (found, stopped, count) == (text, "<think>" not in text, tokens)


def test_special_tokens_may_be_part_of_the_text() -> None:
    tokenizer = ModelTokenizer(byte_level())
    ids = tokenizer.encode("a<|im_end|>b<s>c")
    assert streamed(tokenizer, [], ids, []) == ("abc", False, 5)
    assert streamed(tokenizer, [], ids, [], True) == ("a<|im_end|>b<s>c", False, 5)
    assert streamed(tokenizer, [], ids, ["b<s>"], True) == ("a<|im_end|>", True, 4)


def test_truncation_and_padding_are_switched_off() -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=20)
    assert len(ModelTokenizer(library).encode("0123456789")) == 10


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_text_that_is_no_utf8_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected text in UTF-8, found"):
        ModelTokenizer(byte_level()).encode(text)
