"""Text in pieces: joined, it is what the tokenizer gives for all tokens at once."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers_in_memory import KINDS, MARK, SCRIPTS, byte_fallback, tokenizer_of_kind, with_decoder

from tulle.text.detokenizer import Detokenizer, decode, overlap

words = st.sampled_from([word for line in SCRIPTS for word in line.split()] + ["<s>", "<|im_end|>", "<think>", "é!"])
texts = st.lists(st.one_of(words, st.text(max_size=6), st.sampled_from([" ", "  ", "\n", " .", " n't"]))).map(" ".join)


def pieces_of(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], **options: bool) -> list[str]:
    stream = Detokenizer(tokenizer, prompt, **options)
    return [stream.add(token) for token in tokens] + [stream.finish()]


def assert_exact(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], **options: bool) -> None:
    whole, before = decode(tokenizer, prompt + tokens, **options), decode(tokenizer, prompt, **options)
    rest = whole[len(os.path.commonprefix([whole, before])) :]
    assert "".join(pieces_of(tokenizer, prompt, tokens, **options)) == rest


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=texts, cut=st.floats(0, 1), keep_special=st.booleans(), clean_up=st.booleans())
def test_pieces_of_a_text_add_up(kind: str, text: str, cut: float, keep_special: bool, clean_up: bool) -> None:
    tokenizer = tokenizer_of_kind(kind)
    ids = tokenizer.encode(text).ids
    at = int(cut * len(ids))
    assert_exact(tokenizer, ids[:at], ids[at:], keep_special=keep_special, clean_up=clean_up)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data(), keep_special=st.booleans(), clean_up=st.booleans())
def test_pieces_of_any_tokens_add_up(kind: str, data: st.DataObject, keep_special: bool, clean_up: bool) -> None:
    tokenizer = tokenizer_of_kind(kind)
    # Also ids that the vocabulary does not have: a model's table may be larger.
    ids = st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=40)
    prompt, tokens = data.draw(ids), data.draw(ids)
    assert_exact(tokenizer, prompt, tokens, keep_special=keep_special, clean_up=clean_up)


@pytest.mark.parametrize("kind", ["byte-level BPE", *(k for k in KINDS if "fallback" in k)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_long_texts_of_every_script_come_whole(kind: str, script: str) -> None:
    tokenizer = tokenizer_of_kind(kind)
    text = f"{script} " * 40
    ids = tokenizer.encode(text).ids
    pieces = pieces_of(tokenizer, ids[:1], ids[1:])
    assert decode(tokenizer, ids[:1]).removesuffix("\ufffd") + "".join(pieces) == decode(tokenizer, ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_space_before_the_first_word_stays() -> None:
    tokenizer = byte_fallback()
    prompt, following = tokenizer.encode("Once upon a").ids, tokenizer.encode("time there").ids
    assert "".join(pieces_of(tokenizer, prompt, following)) == " time there"
    assert "".join(pieces_of(tokenizer, [], following)) == "time there"


def test_half_characters_at_the_end_are_as_the_tokenizer_gives_them() -> None:
    for kind in ("byte-level BPE", "byte fallback, first space"):
        tokenizer = tokenizer_of_kind(kind)
        ids = tokenizer.encode("a \N{MATHEMATICAL BOLD CAPITAL A}").ids
        pieces = pieces_of(tokenizer, [], ids[:-1])
        assert "\ufffd" not in "".join(pieces[:-1]) and "\ufffd" in pieces[-1]
        assert "".join(pieces) == decode(tokenizer, ids[:-1])


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = tokenizer_of_kind("byte-level BPE")
    ids = tokenizer.encode("Grüße, 世界 🙂").ids
    stream, given_out = Detokenizer(tokenizer), ""
    for number, token in enumerate(ids, 1):
        given_out += stream.add(token)
        assert given_out == decode(tokenizer, ids[:number]).rstrip("\ufffd")
    # A run of byte tokens is certain when it ends.
    tokenizer = tokenizer_of_kind("byte fallback, no space")
    stream = Detokenizer(tokenizer)
    ids = tokenizer.encode("世界 a").ids
    assert [stream.add(token) for token in ids[:6]] == [""] * 6 and stream.add(ids[6]) == "世界 "


def test_a_token_costs_the_same_however_long_the_text() -> None:
    """In calls of functions and in characters that are kept: what a slow machine does not change."""
    tokenizer = tokenizer_of_kind("byte fallback, first space")
    ids = tokenizer.encode("Once upon a time there was a dog . " * 20).ids
    calls = []
    for length in (1, 16):
        stream, count = Detokenizer(tokenizer), 0

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        stream.add(ids[0])
        sys.setprofile(note)
        for token in ids * length:
            stream.add(token)
        sys.setprofile(None)
        calls.append(count / length)
        kept = [text for step in stream._steps for text in vars(step).values() if isinstance(text, str)]
        assert sum(map(len, kept)) < 100
    assert calls[1] <= 1.01 * calls[0]


def test_a_prompt_that_ends_inside_a_character() -> None:
    tokenizer = tokenizer_of_kind("byte-level BPE")
    ids = tokenizer.encode("ab\N{MATHEMATICAL BOLD CAPITAL A}c").ids
    assert "".join(pieces_of(tokenizer, ids[:4], ids[4:])) == "\N{MATHEMATICAL BOLD CAPITAL A}c"


def test_a_strip_at_both_ends() -> None:
    chain = decoders.Sequence([decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip(" ", 1, 2)])
    tokenizer = with_decoder(chain)
    for text in ("▁▁a▁▁▁b▁▁▁", "a▁", "▁a", "▁▁▁▁"):
        ids = [tokenizer.token_to_id(c) for c in text]
        assert "".join(pieces_of(tokenizer, [], ids)) == decode(tokenizer, ids)
    assert "".join(pieces_of(tokenizer, [], [])) == ""  # where the library's own panics


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=6))
def test_overlap(text: str, stop: str) -> None:
    n = overlap(text, stop)
    assert n < len(stop) and text.endswith(stop[:n])
    assert not any(text.endswith(stop[:k]) for k in range(n + 1, min(len(text) + 1, len(stop))))
