"""Log-likelihoods of token sequences, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_PER_BATCH = 1 << 26
"""Vocabulary × tokens of one forward pass: 256 MiB of float32 logits."""


@dataclass(frozen=True)
class Score:
    """Sum over the scored tokens of one sequence."""

    log_likelihood: float
    """Nats, ≤ 0."""
    tokens: int
    greedy: bool
    """Every scored token was the model's first choice."""


def score_sequences(
    model: Any,
    sequences: Sequence[Sequence[int]],
    context: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores of ``sequences``, in their order; ``context[i]`` first tokens of each (default 1) are not scored.

    ``model``: a causal language model of transformers, or one with a ``score_batch`` of its own
    (:class:`tulle.evaluate.engine.EngineModel`).

    Sequences of similar length share a batch, padded on the right. No attention mask is needed: causality keeps the
    padding out of every real position, and padded positions are not read, so batching changes nothing but rounding.
    A model that ``shares_beginnings`` gets those next to each other that begin alike.
    """
    score_batch = getattr(model, "score_batch", None) or partial(_score_batch, model)
    skip = [1] * len(sequences) if context is None else list(context)
    alike = getattr(model, "shares_beginnings", False)
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]) if alike else [-len(sequences[i])])
    budget = max(1, LOGITS_PER_BATCH // int(model.config.vocab_size))
    scores: list[Score | None] = [None] * len(sequences)
    done = 0
    while done < len(order):
        width = len(sequences[order[done]])
        batch = order[done : done + max(1, budget // width)]
        for i, score in zip(batch, score_batch([sequences[i] for i in batch], [skip[i] for i in batch]), strict=True):
            scores[i] = score
        done += len(batch)
        if progress is not None:
            progress(done, len(order))
    return [s for s in scores if s is not None]


def _score_batch(model: Any, sequences: Sequence[Sequence[int]], skip: Sequence[int]) -> list[Score]:
    import torch

    device = next(model.parameters()).device
    ids_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, sequence in zip(ids_BT, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    with torch.inference_mode():
        logits_BTV: Tensor = model(input_ids=ids_BT.to(device), use_cache=False).logits
        scores = []
        for row, (sequence, first) in enumerate(zip(sequences, skip, strict=True)):
            targets_T = ids_BT[row, first : len(sequence)].to(device)
            logits_TV = logits_BTV[row, first - 1 : len(sequence) - 1].float()
            nats_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")
            greedy = bool((logits_TV.argmax(-1) == targets_T).all())
            scores.append(Score(-float(nats_T.double().sum()), len(targets_T), greedy))
    return scores
