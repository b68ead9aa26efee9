"""Held-out bits per byte: the estimate during training and the figure of a finished model.

Both read the held-out documents as one stream (``<|endoftext|>`` before each document and after the last)
in windows of ``context`` inputs, each with the ``context`` targets one token further, so that every token
but the first is predicted once and none sees past its window. Bits of all targets, separators included, per
byte of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tulle.training.corpus import Corpus


@torch.no_grad()
def estimate(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    corpus: Corpus,
    context: int,
    batch: int,
    windows: int,
    device: torch.device | str = "cpu",
) -> float:
    """Bits per byte on about ``windows`` evenly spaced windows of ``context`` tokens.

    ``loss_of`` gives the mean nats per token of inputs ``[batch, context]`` and targets of the same shape. All batches
    have that shape, for compiled code. A window's bytes are taken as their fraction of all held-out tokens.
    """
    count = (len(corpus.held_out) - 1) // context
    chosen = np.linspace(0, count - 1, max(1, windows // batch) * batch).astype(int)  # repeats on a short text
    nats = [
        loss_of(
            *(t.to(device) for t in _pairs(corpus.held_out, chosen[first : first + batch] * context, context))
        ).item()
        for first in range(0, len(chosen), batch)
    ]
    return float(np.mean(nats)) / math.log(2) * (len(corpus.held_out) - 1) / corpus.held_out_bytes


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, corpus: Corpus, context: int, batch: int = 16) -> float:
    """Bits per byte over the whole held-out stream in windows of ``context`` tokens, the last, shorter one included.

    ``model`` is in float32; ``batch`` windows are computed at a time.
    """
    model.eval()
    last = (len(corpus.held_out) - 1) // context * context
    starts = np.arange(0, last, context)
    nats = 0.0
    for first in range(0, len(starts), batch):
        inputs, targets = _pairs(corpus.held_out, starts[first : first + batch], context)
        nats += _summed(model, inputs, targets)
    rest = len(corpus.held_out) - 1 - last
    if rest:
        nats += _summed(model, *_pairs(corpus.held_out, np.array([last]), rest))
    return nats / math.log(2) / corpus.held_out_bytes


def _summed(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()


def _pairs(stream: np.ndarray, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
