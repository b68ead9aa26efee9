"""The tokenizer of a run: trained for a new model, read from the start model, written beside the trained one.

A document becomes token ids, and documents one stream: ``<|endoftext|>`` before each and after the last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from tulle.errors import UserError

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
"""Of a model's tokenizer, as patterns of names."""

# GPT-2's pre-tokenizer with two changes for source code: an underscore is a letter (identifiers stay
# whole), and digits come in groups of at most three. A run of white space keeps its last space for the word
# that follows, so that a newline with its indentation is one piece and `return` is the same token at any
# depth.
_PIECES = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocab_size`` entries, ``<|endoftext|>`` first; lossless on any text.

    Raises ``UserError`` where there is too little text for so many.
    """
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


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the id of its end of text."""

    tokenizer: Tokenizer
    end: int
    folder: Path | None = None
    """The model folder that it was read from; None: it was trained here."""

    @property
    def token_type(self) -> type[np.unsignedinteger]:
        """The smallest type that holds every id."""
        return np.uint16 if self.tokenizer.get_vocab_size() <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """One stream of ids ``[tokens]``: the end of text before each document and after the last."""
        parts = [
            np.array([self.end, *encoding.ids], self.token_type)
            for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        return np.concatenate([*parts, np.array([self.end], self.token_type)])

    def write_to(self, folder: Path, context: int) -> None:
        """Puts the tokenizer's files into a model folder; ``context`` is the length in tokens that a new one states."""
        if self.folder is None:
            save_tokenizer(self.tokenizer, folder, context)
        else:
            copy_tokenizer(self.folder, folder)


def own_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Of a tokenizer that :func:`train_tokenizer` made."""
    return Vocabulary(tokenizer, int(tokenizer.token_to_id(END_OF_TEXT) or 0))


def read_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer of a model folder. Raises ``UserError`` without one, or without an end of text."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"expected tokenizer.json in {folder}, found none; take a model with a fast tokenizer")
    end = AutoTokenizer.from_pretrained(folder, local_files_only=True).eos_token_id
    if end is None:
        end = AutoConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise UserError(f"expected an end-of-text token in {folder}, found none; set eos_token in its tokenizer")
    return Vocabulary(Tokenizer.from_file(str(file)), int(end), folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers loads them."""
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files from one model folder to another."""
    for pattern in FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
