"""From text to scored passages: the protocol behind every perplexity figure.

* *Documents* (the text was cut by a separator, or comes in rows): each is its own sequence, cut at ``length`` tokens,
  or with ``whole`` goes on in further windows of that length.
* *Stream* (otherwise): everything joined by blank lines, in non-overlapping windows of ``length`` tokens, as in the
  GPTQ line of papers: a shorter last window is dropped unless it is the only one.

A document or stream begins with the tokenizer's BOS token if it has one. The first token of a passage (BOS, or the
first of a later window) is context only; all others are scored.

Bytes of the scored text are counted by the tokenizer's offsets: a character belongs to the token that completes it, so
one that a cut falls into is not counted, and consecutive windows never count a byte twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tulle.errors import UserError
from tulle.text.reading import Text, read_text
from tulle.text.tokenizer import ModelTokenizer

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into sequences."""

    length: int | None = None
    """Tokens per sequence, BOS included; None: 2048 or the model's context, whichever is less."""
    bos: bool = True
    """Begin each document or stream with the tokenizer's BOS token, if it has one."""
    whole: bool = False
    """Documents longer than ``length`` go on in further windows instead of being cut."""


@dataclass(frozen=True)
class Passage:
    """One sequence for the model; ``ids[0]`` is context, the rest is scored."""

    ids: list[int]
    bytes: int
    """UTF-8 bytes of the text that the scored tokens stand for."""


def read_documents(
    file: str, separator: str | None = None, documents: tuple[int, int] | None = None, min_chars: int = 1
) -> Text:
    """One file as documents (:func:`tulle.text.reading.read_text`); ``source`` says what was selected."""
    text = read_text([file], separator, documents, min_chars)
    parts = [", ".join(text.source)]
    if separator is not None:
        parts.append(f"cut at {separator!r}, stripped")
    if min_chars > 1:
        parts.append(f"at least {min_chars} characters")
    if documents is not None:
        parts.append(f"documents {documents[0]}:{documents[1]} of these")
    return replace(text, source=(", ".join(parts),))


def resolve_length(length: int | None, context: int | None) -> int:
    """Tokens per sequence for a model of this context. Raises ``UserError`` if ``length`` is beyond it or below 2."""
    if length is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if length < 2 or (context is not None and length > context):
        raise UserError(
            f"expected a length from 2 to the model's context ({context} tokens), found {length}; try another --length"
        )
    return length


def passages(text: Text, tokenizer: Any, protocol: Protocol, length: int) -> list[Passage]:
    """Passages of 2 to ``length`` tokens, in order.

    Raises ``UserError`` if the text has nothing to score.
    """
    found: list[Passage] = []
    for document in text.documents if text.separate else ["\n\n".join(text.documents)]:
        ids, ends = _encode(document, tokenizer, protocol.bos)
        if not text.separate:
            windows = max(1, len(ids) // length)
        else:
            windows = -(-len(ids) // length) if protocol.whole else 1
        for first in range(0, windows * length, length):
            part = ids[first : first + length]
            if len(part) > 1:
                found.append(Passage(part, ends[first + len(part) - 1] - ends[first]))
    if not found:
        raise UserError("expected text of two tokens or more to score, found less; try a longer text")
    return found


def describe(text: Text, protocol: Protocol, length: int, windows: int, has_bos: bool) -> str:
    """The protocol as one line."""
    if text.separate:
        how = f"{len(text.documents)} documents, one sequence each, cut at {length} tokens"
        if protocol.whole:
            how = f"{len(text.documents)} documents in {windows} windows of up to {length} tokens"
    else:
        how = f"one stream in {windows} non-overlapping windows of {length} tokens"
    return f"{', '.join(text.source)}: {how}; {'BOS first' if has_bos else 'no BOS, first token unscored'}"


def begins_with_bos(tokenizer: Any, protocol: Protocol) -> bool:
    """Whether documents and streams begin with BOS."""
    return protocol.bos and bos_id(tokenizer) is not None


def bos_id(tokenizer: Any) -> int | None:
    """The id of BOS, of transformers' tokenizer or of Tulle's; None where the model has none."""
    found: int | None = (
        tokenizer.special_id("bos_token") if isinstance(tokenizer, ModelTokenizer) else tokenizer.bos_token_id
    )
    return found


def encode_with_offsets(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids without special tokens, and the ``(start, end)`` characters of each.

    ``tokenizer``: transformers' or Tulle's. Raises ``UserError`` for a tokenizer without offsets.
    """
    if isinstance(tokenizer, ModelTokenizer):
        own = tokenizer.tokenizer.encode(text, add_special_tokens=False)
        return list(own.ids), list(own.offsets)
    if not tokenizer.is_fast:
        raise UserError("expected a tokenizer with offsets, found none; try a model folder with tokenizer.json")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _encode(text: str, tokenizer: Any, bos: bool) -> tuple[list[int], list[int]]:
    """Token ids, and for each the number of bytes of the text completed up to and including it."""
    ids, offsets = encode_with_offsets(text, tokenizer)
    characters = [end for _, end in offsets]
    for k in range(len(ids) - 1):
        # If the next token starts before this one ends, both are parts of one character: the last part completes it.
        characters[k] = min(characters[k], offsets[k + 1][0])
    if characters:
        characters[-1] = len(text)  # trailing white space that the tokenizer trimmed off its offsets
    ends, done, total = [], 0, 0
    for character in characters:
        if character > done:
            total += len(text[done:character].encode())
            done = character
        ends.append(total)
    first = bos_id(tokenizer) if bos else None
    if first is not None:
        return [first, *ids], [0, *ends]
    return ids, ends
