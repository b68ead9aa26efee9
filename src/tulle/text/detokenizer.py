"""Tokens to text piece by piece, so that the pieces joined are what the tokenizer gives for all tokens at once.

A tokenizer's decoder is a chain of steps over a list of tokens: drop the word marks, turn byte tokens into characters,
join, strip the first space. Decoding the last few tokens again and again gets the borders wrong: a space is stripped
that stands in the middle, or a window begins inside a character. Here every step of the chain is run once over the
stream and keeps what it needs: bytes of an unfinished character, whether it saw the first token, a space that the next
token may still remove. So a token costs the same however long the text is.

Text is given out when no later token can change it. A run of byte tokens (``<0xE4>``) is such a case: one wrong byte
turns all of the run into replacement characters, so that the run waits for its end. A chain with a step that is not
known here is run by the library when the text ends.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What ``clean_up_tokenization_spaces`` replaces, in this order, as transformers does."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Step(Protocol):
    """One step of a decoder's chain over a stream."""

    def push(self, token: str) -> list[str]:
        """What is certain with this token."""
        ...

    def end(self) -> list[str]:
        """The rest."""
        ...


class Detokenizer:
    """The text after a prompt: ``add`` gives what a token makes certain, ``finish`` the rest.

    The pieces, joined, are ``decode(prompt + tokens)`` without the characters at its beginning that are also those of
    ``decode(prompt)``: all of them, but where the prompt ends inside a character. ``decode`` leaves out special tokens
    unless ``keep_special``, and cleans up spaces as transformers does with ``clean_up``.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, keep_special: bool = False, clean_up: bool = False
    ):
        self._tokenizer = tokenizer
        self._hidden = frozenset() if keep_special else special_ids(tokenizer)
        self._steps = _steps(tokenizer.decoder, clean_up)
        for token in prompt:
            self._push(token)
        self._known = self._rest(copy.deepcopy(self._steps)) if prompt else ""
        """Text of the prompt that is still to come."""

    def add(self, token: int) -> str:
        """Text that is certain now."""
        return self._new(self._push(token))

    def finish(self) -> str:
        """Text that waited for more tokens."""
        return self._new(self._rest(self._steps))

    def _push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        text = self._tokenizer.id_to_token(token)
        return "" if text is None else _through(self._steps, [text])

    def _rest(self, steps: list[_Step]) -> str:
        return "".join(_through(steps[number + 1 :], step.end()) for number, step in enumerate(steps))

    def _new(self, text: str) -> str:
        """``text`` without what the prompt already said."""
        if not self._known or not text:
            return text
        same = next(
            (i for i, (a, b) in enumerate(zip(text, self._known, strict=False)) if a != b),
            min(len(text), len(self._known)),
        )
        self._known = self._known[same:] if same == len(text) else ""
        return text[same:]


def _through(steps: Sequence[_Step], tokens: list[str]) -> str:
    for step in steps:
        tokens = [found for token in tokens for found in step.push(token)]
    return "".join(tokens)


def decode(tokenizer: Tokenizer, tokens: Sequence[int], *, keep_special: bool = False, clean_up: bool = False) -> str:
    """The text of all tokens at once, which the pieces of a :class:`Detokenizer` add up to."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=not keep_special)
    for old, new in CLEAN_UP if clean_up else ():
        text = text.replace(old, new)
    return text


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that decoding leaves out."""
    return frozenset(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What every token adds to the bytes of a text, in the middle of it; nothing for ids without a token.

    A token that is read differently beside another (CTC's repeats, patterns over the joined text) is read alone.
    """
    count = max(tokenizer.get_vocab().values(), default=-1) + 1
    tokens = [tokenizer.id_to_token(number) for number in range(count)]
    kinds = {spec["type"] for spec in _flat(json.loads(tokenizer.decoder.__getstate__()))} if tokenizer.decoder else ()
    if "ByteLevel" in kinds:
        return [b"" if token is None else _own_bytes(token) for token in tokens]
    # Between tokens of one letter, so that none is the first or the last.
    letter = next((n for n, token in enumerate(tokens) if token is not None and re.fullmatch("[a-z]", token)), 0)
    start, both = (len(tokenizer.decode([letter] * n, skip_special_tokens=False)) for n in (1, 2))
    triples = [[letter] * 2 if token is None else [letter, number, letter] for number, token in enumerate(tokens)]
    texts = tokenizer.decode_batch(triples, skip_special_tokens=False)
    found = [text[start : len(text) - (both - start)].encode() for text in texts]
    if "ByteFallback" in kinds:
        for number, token in enumerate(tokens):
            if token is not None and _BYTE.fullmatch(token):
                found[number] = bytes([int(token[3:5], 16)])
    return found


def _own_bytes(token: str) -> bytes:
    """Of byte-level BPE."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _steps(decoder: Any, clean_up: bool) -> list[_Step]:
    """The chain of a decoder, followed by the cleaning up."""
    steps: list[_Step] = []
    joined = False
    if decoder is None:
        steps.append(_ByPosition(lambda token: token, lambda token: f" {token}"))
    else:
        specs = _flat(json.loads(decoder.__getstate__()))
        for number, spec in enumerate(specs):
            made = _joined_step(spec) if joined else _step(spec)
            if made is None:
                steps.append(_AtTheEnd(_decoder({"type": "Sequence", "decoders": specs[number:]}), joined))
                break
            steps.append(made)
            joined = joined or spec["type"] in ("Fuse", "ByteLevel")
    return steps + [_ReplaceText(old, new) for old, new in CLEAN_UP if clean_up]


def _flat(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [step for inner in spec["decoders"] for step in _flat(inner)]


def _decoder(spec: dict[str, Any]) -> Any:
    """The library's decoder of this description."""
    decoder = decoders.Fuse()
    decoder.__setstate__(json.dumps(spec).encode())
    return decoder


def _step(spec: dict[str, Any]) -> _Step | None:
    """The step while tokens are still apart; None for one that is not known."""
    kind, library = spec["type"], _decoder(spec)

    def one(token: str) -> str:
        return str(library.decode([token]))

    def later(token: str) -> str:
        return str(library.decode(["", token]))

    def earlier(token: str) -> str:
        return str(library.decode([token, ""]))

    if kind in ("Replace", "Strip"):
        return _EachToken(_remembered(one))
    if kind in ("Metaspace", "WordPiece"):
        return _ByPosition(one, _remembered(later))
    if kind == "BPEDecoder":
        return _ButTheLast(_remembered(earlier), one)
    if kind == "CTC":
        return _WithoutRepeats(_remembered(one))
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind == "ByteLevel":
        return _ByteLevel()
    return _Join() if kind == "Fuse" else None


def _joined_step(spec: dict[str, Any]) -> _Step | None:
    """The step once the tokens are joined to one; None for one that cannot be run over a stream."""
    if spec["type"] == "Fuse":
        return _Join()
    if spec["type"] == "Strip":
        return _StripText(spec["content"], spec["start"], spec["stop"])
    if spec["type"] == "Replace" and "String" in spec["pattern"]:
        return _ReplaceText(spec["pattern"]["String"], spec["content"])
    return None


def _remembered(function: Callable[[str], str]) -> Callable[[str], str]:
    """The function, which asks the library once per token."""
    known: dict[str, str] = {}

    def found(token: str) -> str:
        if token not in known:
            known[token] = function(token)
        return known[token]

    return found


class _EachToken:
    """A step that looks at one token alone."""

    def __init__(self, change: Callable[[str], str]):
        self._change = change

    def push(self, token: str) -> list[str]:
        return [self._change(token)]

    def end(self) -> list[str]:
        return []


class _ByPosition:
    """A step that treats the first token differently."""

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]):
        self._change, self._later = first, later

    def push(self, token: str) -> list[str]:
        change, self._change = self._change, self._later
        return [change(token)]

    def end(self) -> list[str]:
        return []


class _ButTheLast:
    """A step that treats the last token differently, so that one token is held."""

    def __init__(self, earlier: Callable[[str], str], last: Callable[[str], str]):
        self._earlier, self._last = earlier, last
        self._held: str | None = None

    def push(self, token: str) -> list[str]:
        held, self._held = self._held, token
        return [] if held is None else [self._earlier(held)]

    def end(self) -> list[str]:
        return [] if self._held is None else [self._last(self._held)]


class _WithoutRepeats:
    """CTC's step: a token that repeats the one before, or that becomes nothing, is no token."""

    def __init__(self, change: Callable[[str], str]):
        self._change = change
        self._before: str | None = None

    def push(self, token: str) -> list[str]:
        if token == self._before:
            return []
        self._before = token
        changed = self._change(token)
        return [changed] if changed else []

    def end(self) -> list[str]:
        return []


class _ByteFallback:
    """Runs of byte tokens to characters; a run that is no UTF-8 gives one replacement character per byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        if _BYTE.fullmatch(token):
            self._run.append(int(token[3:5], 16))
            return []
        return [*self.end(), token]

    def end(self) -> list[str]:
        run, self._run = self._run, bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(run)


class _ByteLevel:
    """Tokens whose characters stand for bytes; those of a token with another character are its own bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        return [self._decoder.decode(_own_bytes(token))]

    def end(self) -> list[str]:
        return [self._decoder.decode(b"", True)]


def _byte_alphabet() -> dict[str, int]:
    """The character of each byte in byte-level BPE (Radford et al. 2019): its own where it can be seen."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


class _Join:
    """What comes after it sees one text."""

    def push(self, token: str) -> list[str]:
        return [token]

    def end(self) -> list[str]:
        return []


class _StripText:
    """At most so many of a character off the beginning and the end of the text."""

    def __init__(self, content: str, start: int, stop: int):
        self._content, self._start, self._stop = content, start, stop
        self._held = 0

    def push(self, token: str) -> list[str]:
        if not token:
            return []
        while self._start and token.startswith(self._content):
            token, self._start = token[1:], self._start - 1
        if not token:
            return []
        self._start = 0
        if not self._stop:
            return [token]
        text = self._content * self._held + token
        kept = text.rstrip(self._content)
        self._held = min(len(text) - len(kept), self._stop)
        return [text[: len(text) - self._held]]

    def end(self) -> list[str]:
        return []


class _ReplaceText:
    """A string replaced wherever it stands in the text."""

    def __init__(self, old: str, new: str):
        self._old, self._new = old, new
        self._held = ""

    def push(self, token: str) -> list[str]:
        if not self._old:
            return [token]
        *done, rest = (self._held + token).split(self._old)
        keep = overlap(rest, self._old)
        self._held = rest[len(rest) - keep :]
        return ["".join(part + self._new for part in done) + rest[: len(rest) - keep]]

    def end(self) -> list[str]:
        held, self._held = self._held, ""
        return [held]


class _AtTheEnd:
    """Steps that the library runs when all tokens are there."""

    def __init__(self, decoder: Any, joined: bool):
        self._decoder, self._joined = decoder, joined
        self._tokens: list[str] = []

    def push(self, token: str) -> list[str]:
        self._tokens.append(token)
        return []

    def end(self) -> list[str]:
        tokens = ["".join(self._tokens)] if self._joined else self._tokens
        return [self._decoder.decode(tokens)]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``, fewer than all of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
