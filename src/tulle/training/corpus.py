"""Token streams to train and to evaluate on, and the order in which training sees its windows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tulle.errors import UserError
from tulle.training.recipe import TextData
from tulle.training.sources import held_out_texts, training_documents
from tulle.training.tokenizer import Vocabulary, own_vocabulary, read_vocabulary, train_tokenizer

CHUNK = 256
"""Documents in memory at a time."""


@dataclass(frozen=True)
class Corpus:
    """Tokenizer and token streams ``[tokens]``, uint16 (uint32 for vocabularies that need it)."""

    vocabulary: Vocabulary
    train: np.ndarray
    """A memory map."""
    held_out: np.ndarray
    held_out_bytes: int
    """Of the held-out text in UTF-8."""

    def windows(self, context: int, seed: int) -> Windows:
        """Of the training side. Raises ``UserError`` where either side is shorter than one window."""
        if len(self.held_out) <= context:
            raise UserError(
                f"expected at least {context + 1} held-out tokens, found {len(self.held_out)}; "
                "try more held_out text or a shorter context"
            )
        return Windows(self.train, context, seed)


def prepare(data: TextData, seed: int, folder: Path, tokenizer: Path | int) -> Corpus:
    """The corpus of ``data``. ``tokenizer``: a model folder that has one, or the size of one to train on the documents.

    Tokenizer and tokens are kept in ``folder`` and found there by an equal run. Documents are read, encoded and written
    a few at a time. Raises ``UserError`` for text that is missing, unreadable or too little.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = tokenizer if isinstance(tokenizer, int) else 0
    vocabulary = None if isinstance(tokenizer, int) else read_vocabulary(tokenizer)
    identity = str(size) if vocabulary is None else f"{vocabulary.end}:{vocabulary.tokenizer.to_str()}"
    key = hashlib.sha256(f"{seed}:{data.model_dump_json()}:{identity}".encode()).hexdigest()[:16]
    tokens = folder / f"train-{key}.bin"
    held_out = held_out_texts(data, folder)
    documents = None if tokens.is_file() else training_documents(data, seed, folder, held_out)
    if vocabulary is None:
        file = folder / f"tokenizer-{key}.json"
        if documents is not None:
            train_tokenizer((document.text for document in documents), size).save(str(file))
        vocabulary = own_vocabulary(Tokenizer.from_file(str(file)))
    if documents is not None:
        partial = tokens.with_suffix(".partial")
        with partial.open("wb") as out:
            for first in range(0, len(documents), CHUNK):
                texts = [document.text for document in documents[first : first + CHUNK]]
                vocabulary.encode(texts)[:-1].tofile(out)
            vocabulary.encode([]).tofile(out)
        os.replace(partial, tokens)  # last: a cache that exists is complete
    return Corpus(
        vocabulary=vocabulary,
        train=np.memmap(tokens, vocabulary.token_type, "r"),
        held_out=vocabulary.encode(held_out),
        held_out_bytes=sum(len(text.encode()) for text in held_out),
    )


class EpochOrder:
    """Indices 0 … count − 1, all of them once in every epoch, each epoch in a seeded order of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        """At place ``position`` of the whole run."""
        epoch, index = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        return int(self._order[index])


class Windows:
    """The order of training windows: a function of the seed and the position, whatever the run's length.

    Window ``i`` is the tokens ``[i*context, (i+1)*context]``: ``context`` inputs and, one further, their
    targets. Each epoch visits all windows once in its own seeded permutation. Raises ``UserError`` for a stream
    that is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int) -> None:
        self.tokens, self.context = tokens, context
        self.count = (len(tokens) - 1) // context
        if self.count < 1:
            raise UserError(
                f"expected at least {context + 1} training tokens, found {len(tokens)}; "
                "try more sources or a shorter context"
            )
        self._order = EpochOrder(self.count, seed)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Batches ``start … stop-1`` of the run, each of ``size`` windows: (size, context + 1) int64."""
        for number in range(start, stop):
            yield self.batch(number * size, size)

    def batch(self, first: int, size: int) -> np.ndarray:
        """Windows ``first … first+size-1`` of the run, (size, context + 1) int64."""
        rows = []
        for position in range(first, first + size):
            start = self._order[position] * self.context
            rows.append(self.tokens[start : start + self.context + 1])
        return np.stack(rows).astype(np.int64)
