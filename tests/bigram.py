"""A language model whose probabilities can be computed by hand: the next token depends on the last one only."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast


class Bigram:
    """Looks like a transformers model to the scoring; ``table`` holds log-probabilities ``[V, V]``."""

    def __init__(self, vocabulary: int, context: int = 64, seed: int = 0) -> None:
        logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = logits.log_softmax(-1).float()
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=context)
        self.calls: list[tuple[int, ...]] = []

    def parameters(self) -> Iterator[Tensor]:
        yield self.table

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        self.calls.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])

    def log_likelihood(self, ids: list[int], first: int = 1) -> float:
        return sum(float(self.table[ids[k - 1], ids[k]]) for k in range(first, len(ids)))


def byte_tokenizer(bos: bool, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, plus merged pairs; ``<s>`` is BOS, which the tokenizer itself never adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>"} if bos else {}))
