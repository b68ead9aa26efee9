"""SentencePiece models (``tokenizer.model``) as tokenizers of the ``tokenizers`` library, without the library that
wrote them.

The file is a protocol buffer (``sentencepiece_model.proto`` of Google's SentencePiece). Of its fields, only the pieces
with their scores and kinds, and a few settings, are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tulle.errors import UserError
from tulle.text.charsmap import check_charsmap

SPACE = "\u2581"
"""What stands for a space in a piece."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces; GGUF files number them alike."""
UNIGRAM, BPE = 1, 2
"""Kinds of models, as the file numbers them."""


@dataclass(frozen=True)
class Piece:
    """A token of a SentencePiece model."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a SentencePiece model says, from a ``tokenizer.model`` or from the metadata of a GGUF file."""

    pieces: Sequence[Piece]
    """By their ids."""
    kind: int = BPE
    byte_fallback: bool = True
    """Characters without a piece become byte tokens ``<0x41>``."""
    unknown: int | None = 0
    """The id of the unknown token."""
    bos: int | None = 1
    eos: int | None = 2
    pad: int | None = None
    charsmap: bytes = b""
    """The compiled normalisation of characters, or nothing."""
    space_prefix: bool = True
    """A text begins with a space that is not there."""


def parse(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a ``tokenizer.model``. Raises ``UserError`` where they are none."""
    try:
        return _parse(data)
    except (ValueError, KeyError, struct.error, IndexError) as error:
        raise UserError(
            f"expected a SentencePiece model as tokenizer.model, found {error}; save the tokenizer as tokenizer.json "
            "with transformers' save_pretrained"
        ) from None


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            (score,) = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))
            pieces.append(Piece(_bytes(piece.get(1, b"")).decode(), score, _number(piece.get(3, NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces in it")

    def token(field: int, default: int) -> int | None:
        # A negative number (none) comes as 2⁶⁴ less one.
        found = _number(trainer.get(field, default))
        return found if 0 <= found < len(pieces) else None

    return SentencePieceModel(
        pieces,
        _number(trainer.get(3, UNIGRAM)),
        bool(trainer.get(35, 0)),
        token(40, 0),
        token(41, 1),
        token(42, 2),
        token(43, -1),
        _bytes(normalizer.get(2, b"")),
        bool(normalizer.get(3, 1)),
    )


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a text should be")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError("a text where a number should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer: whole numbers, or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + size > len(data):
            raise ValueError("an end within a field")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[place]
        value, place = value | (byte & 127) << shift, place + 1
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("a number without an end")


def merges_of(pieces: Sequence[Piece], without: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding that give what SentencePiece's BPE gives.

    SentencePiece joins the two neighbours whose union has the highest score. So every split of a piece into two pieces
    is a merge, and merges rank by the score of what they make; at equal scores, by ids. Pieces ``without`` are no part.
    """
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.text not in without}
    found = []
    for text, number in ids.items():
        splits = ((text[:i], text[i:]) for i in range(1, len(text)))
        halves = [(ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
        found += [(-pieces[number].score, number, *half) for half in halves]
    return [(a, b) for _, _, _, _, a, b in sorted(found)]


def tokenizer_of(model: SentencePieceModel, prefix: Literal["always", "first", "never"] | None = None) -> Tokenizer:
    """The tokenizer of a model, with its control and user-defined pieces as added tokens.

    ``prefix``: whether every part of a text between special tokens begins with a space, or the first part alone
    [``first`` where the model says that texts begin with a space, else ``never``]. Adds no BOS: that is the caller's.
    Raises ``UserError`` for a kind of model that is neither BPE nor unigram.
    """
    pieces = model.pieces
    unknown = None if model.unknown is None else pieces[model.unknown].text
    if model.kind == BPE:
        bpe = models.BPE(
            {piece.text: number for number, piece in enumerate(pieces)},
            merges_of(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
        tokenizer = Tokenizer(bpe)
    elif model.kind == UNIGRAM:
        scores = [(piece.text, piece.score) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, model.unknown, model.byte_fallback))
    else:
        raise UserError(
            f"expected a SentencePiece model of BPE or unigram, found kind {model.kind}; save the tokenizer as "
            "tokenizer.json with transformers' save_pretrained"
        )
    if prefix is None:
        prefix = "first" if model.space_prefix else "never"
    if model.charsmap:
        try:
            check_charsmap(model.charsmap)
            tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"expected a table of characters in the SentencePiece model, found {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prefix, split=False)
    tokenizer.decoder = decoder_of(prefix != "never")
    tokenizer.add_tokens([
        AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
        for piece in pieces
        if piece.kind in (CONTROL, USER_DEFINED)
    ])  # fmt: skip
    return tokenizer


def decoder_of(space_prefix: bool) -> Any:
    """Pieces to text: marks to spaces, bytes to characters; ``space_prefix``: without the first space."""
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)


def special_tokens(model: SentencePieceModel) -> Mapping[str, str]:
    """Special tokens by name, as :class:`tulle.text.tokenizer.ModelTokenizer` takes them."""
    ids = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unknown, "pad_token": model.pad}
    return {name: model.pieces[number].text for name, number in ids.items() if number is not None}
