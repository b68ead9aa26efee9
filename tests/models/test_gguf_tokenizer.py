"""Tokenizers of GGUF files against the ones they were made of, and SentencePiece's own algorithm."""

from __future__ import annotations

import heapq
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tulle.errors import UserError
from tulle.models.gguf.tokenizer import BYTE, CONTROL, NORMAL, PRE, SAME, UNKNOWN, chat_template, tokenizer_of

TEXT = (
    "The quick brown fox jumps over the lazy dog. Don't they'll we've I'M 12345 3.14 foo_bar();\n\n\tif x:\r\n"
    "naïve café 日本語 русский ไทย हिन्दी 😀 CamelCase HTTPServer  two  spaces   three "
)


def byte_level(cuts: tuple[str, ...], ignore_merges: bool = False) -> Tokenizer:
    """A byte-level tokenizer trained on TEXT, as Hugging Face folders hold them."""
    found = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    found.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator([TEXT] * 3, trainer)
    found.add_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>", special=True), AddedToken("[TOOL]")])
    return found


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """As a converter writes it."""
    import json

    data = json.loads(tokenizer.to_str())
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [names[n] for n in range(len(names))]
    kinds = [CONTROL if t in ("<s>", "<|im_end|>") else 4 if t == "[TOOL]" else NORMAL for t in tokens]
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"), "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }  # fmt: skip


PAIRS = {pre: (byte_level(PRE[pre].cuts, PRE[pre].ignore_merges),) for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe")}
MADE = {pre: tokenizer_of(metadata_of(one, pre) | {"tokenizer.ggml.add_bos_token": False}).tokenizer
        for pre, (one,) in PAIRS.items()}  # fmt: skip


@pytest.mark.parametrize("pre", PAIRS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.text("aé日 \n\t1'sS<|im_end|>[TOOL]", max_size=40))
def test_byte_level_tokenizers_cut_like_the_original(pre: str, text: str) -> None:
    (original,) = PAIRS[pre]
    ids = original.encode(text).ids
    assert MADE[pre].encode(text).ids == ids
    assert MADE[pre].decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_hugging_faces_own_ways_to_say_the_cuts() -> None:
    """SmolLM2's folder says Digits and ByteLevel's own expression."""
    whole = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made = MADE["smollm"].pre_tokenizer
    for text in (TEXT, "a1b22 333", " x", "\n\n a"):
        assert [part for part, _ in made.pre_tokenize_str(text)] == [part for part, _ in whole.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("gpt-2", "Don't 1234 x", ["Don", "'t", " 1234", " x"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("qwen2", "I'M 12", ["I", "'M", " ", "1", "2"]),
        ("llama-bpe", "x 12345!!\n y", ["x", " ", "123", "45", "!!\n", " y"]),
        ("tekken", "HTTPServer fooBar 12", ["HTTPServer", " foo", "Bar", " ", "1", "2"]),
        ("gpt-4o", "we'LL 1234/", ["we'LL", " ", "123", "4", "/"]),
    ],
)
def test_cuts_by_hand(pre: str, text: str, parts: list[str]) -> None:
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE[pre].cuts]
    found = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
    assert [part for part, _ in found] == parts


def test_unknown_names_are_refused_by_name() -> None:
    metadata = metadata_of(PAIRS["gpt-2"][0], "gpt-2")
    for key, value, message in (
        ("tokenizer.ggml.pre", "hunyuan", "hunyuan"), ("tokenizer.ggml.model", "t5", "t5"),
        ("tokenizer.ggml.pre", None, "older than May 2024"), ("tokenizer.ggml.tokens", None, "no tokenizer"),
        ("tokenizer.ggml.merges", ["no such"], "tables fit"), ("tokenizer.ggml.token_type", [1], "type for each"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            tokenizer_of(metadata | {key: value})
    assert set(SAME.values()) <= set(PRE) and not set(SAME) & set(PRE)


def test_bos_where_the_file_or_the_kind_says_so() -> None:
    metadata = metadata_of(PAIRS["gpt-2"][0], "gpt-2")
    bos = metadata["tokenizer.ggml.bos_token_id"]
    assert tokenizer_of(metadata).tokenizer.encode("a").ids[0] != bos
    assert tokenizer_of(metadata | {"tokenizer.ggml.add_bos_token": True}).tokenizer.encode("a").ids[0] == bos
    found = tokenizer_of(metadata | {"tokenizer.ggml.pre": "llama3", "tokenizer.ggml.add_eos_token": True})
    assert found.tokenizer.encode("a").ids[0] == bos and found.settings["eos_token"] == "<|im_end|>"
    assert found.tokenizer.encode("a").ids[-1] == metadata["tokenizer.ggml.eos_token_id"]


PIECES = [
    "▁t",
    "he",
    "▁the",
    "in",
    "ing",
    "▁th",
    "er",
    "▁a",
    "an",
    "and",
    "▁and",
    "re",
    "▁w",
    "as",
    "▁was",
    "日本",
    "is",
]
LETTERS = sorted(set("".join(PIECES)) | set("bcdfgjklmopquvxyzABC.,!日本語") | {"▁"})


def sentencepiece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *LETTERS]
    kinds = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * (len(PIECES) + len(LETTERS)))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [-1000.0 - i for i in range(len(LETTERS))]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def pieces_of(text: str, metadata: dict[str, Any], prefix: str = "▁") -> list[int]:
    """SentencePiece's BPE as its paper says it: of all neighbours, merge those whose token has the highest score, the
    leftmost of equals, until none is a token; bytes for what has none."""
    ids = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols: list[str | None] = list((prefix + text if text else "").replace(" ", "▁"))
    heap: list[tuple[float, int, int, str]] = []

    def after(index: int) -> int | None:
        return next((i for i in range(index + 1, len(symbols)) if symbols[i] is not None), None)

    def offer(left: int | None) -> None:
        if left is None or (right := after(left)) is None:
            return
        merged = str(symbols[left]) + str(symbols[right])
        if ids.get(merged, 0) > 258:
            heapq.heappush(heap, (-scores[ids[merged]], left, right, merged))

    for index in range(len(symbols)):
        offer(index)
    while heap:
        _, left, right, merged = heapq.heappop(heap)
        if symbols[left] is None or symbols[right] is None or symbols[left] + symbols[right] != merged:
            continue
        symbols[left], symbols[right] = merged, None
        offer(next((i for i in range(left - 1, -1, -1) if symbols[i] is not None), None))
        offer(left)
    found: list[int] = []
    for symbol in symbols:
        if symbol is not None:
            known = ids.get(symbol)
            found += [known] if known is not None else [3 + b for b in symbol.encode()]
    return found


@settings(max_examples=200, deadline=None)
@given(text=st.text("the and was ing日本語ไ!A", max_size=30) | st.text(max_size=12))
def test_sentencepiece_merges_by_score(text: str) -> None:
    metadata = sentencepiece()
    found = tokenizer_of(metadata).tokenizer
    if "<" in text or "\0" in text:
        return  # special tokens in the text
    ids = found.encode(text, add_special_tokens=False).ids
    assert ids == pieces_of(text, metadata)
    if unicodedata.normalize("NFC", text) == text and "▁" not in text:
        assert found.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text("the and was ing日本語ไ!A", max_size=30) | st.text(max_size=12))
def test_gemma4_merges_as_the_file_says(text: str) -> None:
    """Merges in the order of the tokens that they make are SentencePiece's of those scores, without a prefix."""
    scored = sentencepiece()
    metadata = scored | {"tokenizer.ggml.model": "gemma4"}
    scores, tokens = metadata.pop("tokenizer.ggml.scores"), metadata["tokenizer.ggml.tokens"]
    known = set(tokens[259:])
    ranked = sorted(known, key=lambda token: -scores[tokens.index(token)])
    halves = [(token[:cut], token[cut:]) for token in ranked for cut in range(1, len(token))]
    metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in halves if known.issuperset(pair)]
    found = tokenizer_of(metadata).tokenizer
    if "<" in text or "\0" in text:
        return  # special tokens in the text
    ids = found.encode(text).ids
    assert ids == [1, *pieces_of(text, scored, prefix="")]
    if unicodedata.normalize("NFC", text) == text and "▁" not in text:
        assert found.decode(ids) == text


def test_sentencepiece_begins_with_bos_and_may_have_no_prefix() -> None:
    metadata = sentencepiece()
    found = tokenizer_of(metadata).tokenizer
    ids = found.encode("the").ids
    assert ids == [1, 259 + PIECES.index("▁the")] and found.decode(ids) == "the"
    bare = tokenizer_of(metadata | {"tokenizer.ggml.add_space_prefix": False}).tokenizer
    ids = bare.encode("the was").ids
    assert [bare.id_to_token(i) for i in ids] == ["<s>", "t", "he", "▁was"] and bare.decode(ids) == "the was"
    with pytest.raises(UserError, match="remove_extra_whitespaces"):
        tokenizer_of(metadata | {"tokenizer.ggml.remove_extra_whitespaces": True})
    with pytest.raises(UserError, match="scores"):
        tokenizer_of({k: v for k, v in metadata.items() if not k.endswith("scores")})


def test_chat_templates() -> None:
    assert chat_template({}) is None
    assert chat_template({"tokenizer.chat_template": "one"}) == "one"
    several = {"tokenizer.chat_template": "one", "tokenizer.chat_templates": ["tool_use"]}
    assert chat_template(several | {"tokenizer.chat_template.tool_use": "two"}) == [
        {"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"},
    ]  # fmt: skip
