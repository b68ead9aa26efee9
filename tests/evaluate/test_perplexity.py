"""Perplexity and bits per byte, against sums made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bigram import Bigram, byte_tokenizer
from tulle.evaluate import Protocol, evaluate_text, scoring
from tulle.text.reading import Text

DOCUMENTS = ["once upon a time", "größer", "the end", "ab"]


def test_figures_equal_the_sums_by_hand() -> None:
    model, tokenizer = Bigram(257), byte_tokenizer(True)
    found = evaluate_text(model, tokenizer, Text.of(DOCUMENTS), Protocol(length=12))
    nats, tokens, size = 0.0, 0, 0
    for document in DOCUMENTS:
        ids = [tokenizer.bos_token_id, *document.encode()[:11]]
        ids = [ids[0], *tokenizer(document)["input_ids"][:11]]
        nats -= model.log_likelihood(ids)
        tokens += len(ids) - 1
        size += min(len(document.encode()), 11)
    assert (found["tokens"], found["bytes"]) == (tokens, size)
    # float32 log-softmax, twice: a few ulp of each term.
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Bigram(256)
    model.table = torch.full((256, 256), -math.log(256))
    found = evaluate_text(model, byte_tokenizer(False), Text(("any text at all",), False, ("test",)))
    assert found["perplexity"] == pytest.approx(256, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(8, rel=1e-6)  # one byte per token


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


def test_batching_changes_nothing(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(0, 300, (length,), generator=generator).tolist() for length in (2, 40, 7, 64, 7, 33, 12, 64, 3)
    ]
    together = scoring.score_sequences(llama, sequences)
    monkeypatch.setattr(scoring, "LOGITS_PER_BATCH", 1)
    alone = scoring.score_sequences(llama, sequences)
    assert [s.tokens for s in together] == [len(s) - 1 for s in sequences] == [s.tokens for s in alone]
    for a, b in zip(together, alone, strict=True):
        # The model runs in float64 and its logits are scored in float32: one rounding of each logit may differ.
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-6)
        assert a.greedy == b.greedy


def test_batches_hold_as_many_sequences_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bigram(10)
    monkeypatch.setattr(scoring, "LOGITS_PER_BATCH", 10 * 16)
    sequences = [[1] * 8, [2] * 4, [3] * 8, [4] * 4, [5] * 30]
    scores = scoring.score_sequences(model, sequences)
    assert model.calls == [(1, 30), (2, 8), (2, 4)]
    assert [s.log_likelihood for s in scores] == [pytest.approx(model.log_likelihood(s), rel=1e-6) for s in sequences]


def test_context_is_not_scored() -> None:
    model = Bigram(10)
    ids = [1, 2, 3, 4, 5]
    (score,) = scoring.score_sequences(model, [ids], context=[3])
    assert score.tokens == 2
    assert score.log_likelihood == pytest.approx(model.log_likelihood(ids, first=3), rel=1e-6)


def test_greedy_only_if_every_scored_token_is_the_first_choice() -> None:
    model = Bigram(10)
    ids = [4]
    for _ in range(3):
        ids.append(int(model.table[ids[-1]].argmax()))
    worst = [*ids[:-1], int(model.table[ids[-2]].argmin())]
    assert [s.greedy for s in scoring.score_sequences(model, [ids, worst])] == [True, False]
