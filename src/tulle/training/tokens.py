"""The tokenizer, the token cache and the order in which windows are seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tulle.errors import UserError
from tulle.text.standard_library import STDLIB, held_out_text, order_key, read_source, split
from tulle.training.recipe import Data, TextData
from tulle.training.sources import index

END_OF_TEXT = "<|endoftext|>"
CHUNK = 256
"""Documents in memory at a time."""

# GPT-2's pre-tokenizer with two changes for source code: an underscore is a letter (identifiers stay
# whole), and digits come in groups of at most three. A run of white space keeps its last space for the word
# that follows, so that a newline with its indentation is one piece and `return` is the same token at any
# depth.
_PIECES = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocab_size`` entries, ``<|endoftext|>`` first; lossless on any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"expected text enough for {vocab_size} tokens, found only {tokenizer.get_vocab_size()}; "
            "try a smaller vocab_size or more sources"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers loads them."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(content, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: Sequence[str], end: int | None = None) -> np.ndarray:
    """One stream, uint16 (uint32 for vocabularies that need it): ``<|endoftext|>`` before each document and one after
    the last. ``end``: its id, where the tokenizer calls it otherwise.
    """
    end = tokenizer.token_to_id(END_OF_TEXT) if end is None else end
    dtype = token_type(tokenizer)
    parts = [
        np.array([end, *encoding.ids], dtype)
        for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ]
    return np.concatenate([*parts, np.array([end], dtype)])


def token_type(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


class Readable(Protocol):
    """A document, wherever its text lies."""

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


def weighted(documents: Sequence[Readable], weight: float, seed: int) -> list[tuple[bytes, Readable]]:
    """Each document ``floor(weight)`` times, and a seeded share of them once more; with the key that
    orders them.
    """
    whole, part = divmod(weight, 1)
    chosen = []
    for document in documents:
        lot = int.from_bytes(order_key(f"lot:{document.name}", seed)[:8], "big")
        for copy in range(int(whole) + (lot < part * 2**64)):
            chosen.append((order_key(f"{copy}:{document.name}", seed), document))
    return chosen


def training_documents(data: TextData, seed: int, cache: Path) -> list[Readable]:
    """The documents of one epoch in seeded order, none of them held out; ``cache`` is for what must be fetched."""
    corpora = [source for source in data.sources if source.name is not None]
    train, _ = split(document for source in corpora for document in read_source(source.label))
    evaluated = set(held_out_documents(data, cache))
    digests = {hashlib.sha256(text.encode()).digest() for text in evaluated}
    chosen: list[tuple[bytes, Readable]] = []
    for source in data.sources:
        if source.name is not None:
            own = [d for d in train if d.name.startswith(f"{source.name}:") and d.text not in evaluated]
            chosen += weighted(own, source.weight, seed)
        else:
            files = [d for d in index(source, cache) if d.digest not in digests]
            chosen += weighted(files, source.weight, seed)
    return [document for _, document in sorted(chosen, key=lambda item: item[0])]


def training_texts(data: TextData, seed: int, cache: Path = Path()) -> list[str]:
    """The texts of :func:`training_documents`."""
    return [document.text for document in training_documents(data, seed, cache)]


def held_out_documents(data: TextData, cache: Path) -> list[str]:
    """The evaluation text that ``data`` names."""
    if not data.held_out:
        return held_out_text()
    found: list[str] = []
    for source in data.held_out:
        if source.name is None:
            found += [document.text for document in index(source, cache)]
        elif source.name == STDLIB:
            found += held_out_text()
        else:
            found += [document.text for document in split(read_source(source.name))[1]]
    return found


@dataclass(frozen=True)
class Corpus:
    """Tokenizer and token streams, ``train`` a memory map; ``held_out_bytes`` of the text in UTF-8."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that exists: the start model's."""

    tokenizer: Tokenizer
    end: int
    """Id of its end of text."""


def prepare(data: TextData, seed: int, context: int, folder: Path, vocabulary: Vocabulary | None = None) -> Corpus:
    """Build tokenizer (unless there is a ``vocabulary``) and token cache in ``folder``, or reuse what an equal recipe
    left there. Documents are read, encoded and written a few at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{seed}:{data.model_dump_json()}".encode()).hexdigest()[:16]
    if vocabulary is not None:
        key = hashlib.sha256(f"{key}:{vocabulary.end}:{vocabulary.tokenizer.to_str()}".encode()).hexdigest()[:16]
    cache, tokenizer_file = folder / f"train-{key}.bin", folder / f"tokenizer-{key}.json"
    documents = None if cache.is_file() else training_documents(data, seed, folder)
    if vocabulary is None:
        assert isinstance(data, Data) and data.vocab_size is not None
        if documents is not None:
            trained = train_tokenizer((document.text for document in documents), data.vocab_size)
            trained.save(str(tokenizer_file))
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        vocabulary = Vocabulary(tokenizer, int(tokenizer.token_to_id(END_OF_TEXT) or 0))
    tokenizer, end = vocabulary.tokenizer, vocabulary.end
    if documents is not None:
        partial = cache.with_suffix(".partial")
        with partial.open("wb") as file:
            for first in range(0, len(documents), CHUNK):
                texts = [document.text for document in documents[first : first + CHUNK]]
                encode(tokenizer, texts, end)[:-1].tofile(file)
            np.array([end], token_type(tokenizer)).tofile(file)
        os.replace(partial, cache)  # last: a cache that exists is complete
    held_out = held_out_documents(data, folder)
    return Corpus(
        tokenizer=tokenizer,
        train=np.memmap(cache, token_type(tokenizer), "r"),
        held_out=encode(tokenizer, held_out, end),
        held_out_bytes=sum(len(text.encode()) for text in held_out),
    )


class Windows:
    """The order of training windows: a function of the seed and the position, whatever the run's length.

    Window ``i`` is the tokens ``[i*context, (i+1)*context]``: ``context`` inputs and, one further, their
    targets. Each epoch visits all windows once in its own seeded permutation.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.count = (len(tokens) - 1) // context
        if self.count < 1:
            raise UserError(
                f"expected at least {context + 1} training tokens, found {len(tokens)}; "
                "try more sources or a shorter context"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, first: int, size: int) -> np.ndarray:
        """Windows ``first … first+size-1`` of the run, (size, context + 1) int64."""
        rows = []
        for position in range(first, first + size):
            epoch, index = divmod(position, self.count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            start = int(self._order[index]) * self.context
            rows.append(self.tokens[start : start + self.context + 1])
        return np.stack(rows).astype(np.int64)
