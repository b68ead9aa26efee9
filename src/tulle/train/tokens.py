"""The tokenizer, the token cache and the order in which windows are seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tulle.errors import UserError
from tulle.train.data import Document, held_out_text, order_key, read_source, split
from tulle.train.recipe import Data

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pre-tokenizer with two changes for source code: an underscore is a letter (identifiers stay
# whole), and digits come in groups of at most three. A run of white space keeps its last space for the word
# that follows, so that a newline with its indentation is one piece and `return` is the same token at any
# depth.
_PIECES = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
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
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
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


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """One stream, uint16: ``<|endoftext|>`` before each document and one after the last."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [np.array([end, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch_fast(list(texts))]
    return np.concatenate([*parts, np.array([end], np.uint16)])


def weighted(documents: Sequence[Document], weight: float, seed: int) -> list[tuple[bytes, Document]]:
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


def training_texts(data: Data, seed: int) -> list[str]:
    """The documents of one epoch in seeded order, none of them held out."""
    train, _ = split(document for source in data.sources for document in read_source(source.name))
    evaluated = set(held_out_text())
    chosen: list[tuple[bytes, Document]] = []
    for source in data.sources:
        own = [d for d in train if d.name.startswith(f"{source.name}:") and d.text not in evaluated]
        chosen += weighted(own, source.weight, seed)
    return [document.text for _, document in sorted(chosen, key=lambda item: item[0])]


@dataclass(frozen=True)
class Corpus:
    """Tokenizer and token streams, ``train`` a memory map; ``held_out_bytes`` of the text in UTF-8."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


def prepare(data: Data, seed: int, context: int, folder: Path) -> Corpus:
    """Build tokenizer and token cache in ``folder``, or reuse what an equal recipe left there."""
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{seed}:{data.model_dump_json()}".encode()).hexdigest()[:16]
    cache, tokenizer_file = folder / f"train-{key}.npy", folder / "tokenizer.json"
    if not cache.is_file():
        texts = training_texts(data, seed)
        tokenizer = train_tokenizer(texts, data.vocab_size)
        save_tokenizer(tokenizer, folder, context)
        partial = cache.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, encode(tokenizer, texts))
        os.replace(partial, cache)  # last: a cache that exists is complete
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    held_out = held_out_text()
    return Corpus(
        tokenizer=tokenizer,
        train=np.load(cache, mmap_mode="r"),
        held_out=encode(tokenizer, held_out),
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
