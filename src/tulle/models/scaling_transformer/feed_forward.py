"""The feed-forward: dense, or with one unit in every block of N (paper, section 3.1).

    controller   l = x·C₁·C₂ + b, reshaped to [d_ff/N, N]          C₁ [d, d_lowrank], C₂ [d_lowrank, d_ff]
    training     m = softmax(l);  index = argmax(log m + 0.1·Gumbel);  with probability 0.3 the one-hot of index with
                 the straight-through gradient of m, else m itself
    decoding     one-hot of argmax l: only d_ff/N columns of W₁ and rows of W₂ are read
    output       y = (relu(x·W₁) ⊙ mask)·W₂ + b₂

Where paper and authors' code leave a choice: the draw between hard and soft is one per layer and pass (as coded); the
mask multiplies after the ReLU (as printed; as coded, before it, what a unit that was not chosen would have given does
not enter the gradient of its score); W₁ has no bias (as coded), here in the dense layer as well, so that the two differ
in nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle.models.scaling_transformer.configuration import ScalingTransformerConfig

GATHERED_SHARE = 0.25
"""Up to 0.25·N tokens, outside training, each reads its own units; beyond, they share one read of the whole. Measured:
on one thread gathering wins up to about N/2 tokens where W₁ and W₂ exceed the caches, up to N/4 where they do not."""


def training_mask(logits: Tensor, temperature: float, hard_probability: float) -> Tensor:
    """The mask ``[..., d_ff/N, N]`` of one training pass, from the controller's logits of the same shape.

    Values are one-hot with ``hard_probability`` (one draw for all), else the softmax; the gradient is the softmax's.
    """
    soft = logits.float().softmax(-1)
    if torch.rand(()) >= hard_probability:
        return soft
    with torch.no_grad():
        gumbel = -torch.empty_like(soft).exponential_().log_()  # −log of an exponential is Gumbel(0, 1)
        # log m differs from the logits by one number per block, which no argmax sees.
        chosen = one_hot(torch.add(logits, gumbel, alpha=temperature).argmax(-1), soft)
    return chosen + (soft - soft.detach())


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """``[..., N]`` for index ``[...]``, in the shape and type of ``like``."""
    return torch.zeros_like(like).scatter_(-1, index[..., None], 1)


def gathered_feed_forward(x: Tensor, units: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """``[T, d]``: relu(x·w1ᵀ)·w2 of the chosen units alone.

    x is ``[T, d]``, w1 and w2 ``[d_ff, d]``, units ``[T, d_ff/N]`` the rows of both that are read.
    """
    active = (functional.embedding(units, w1) @ x[..., None]).squeeze(-1).relu()
    return functional.embedding_bag(units, w2, per_sample_weights=active.to(w2.dtype), mode="sum")


class Controller(nn.Module):
    """Scores of the units of each block."""

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__()
        assert config.ff_block is not None
        self.shape = (config.intermediate_size // config.ff_block, config.ff_block)
        self.c1 = nn.Linear(config.hidden_size, config.controller_rank, bias=False)
        self.c2 = nn.Linear(config.controller_rank, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` → ``[..., d_ff/N, N]``."""
        return self.c2(self.c1(x)).unflatten(-1, self.shape)


class SparseFeedForward(nn.Module):
    """``w1`` and ``w2`` are both ``[d_ff, d]``: what one unit needs of either is one contiguous row."""

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__()
        self.temperature, self.hard_probability = config.ff_temperature, config.ff_hard_probability
        self.controller = Controller(config)
        self.w1 = nn.Parameter(torch.empty(config.intermediate_size, config.hidden_size))
        self.w2 = nn.Parameter(torch.empty(config.intermediate_size, config.hidden_size))
        self.b2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` → ``[B, T, d]``."""
        logits = self.controller(x)
        if self.training:
            return self._masked(x, training_mask(logits, self.temperature, self.hard_probability))
        index = logits.argmax(-1)
        blocks, block = self.controller.shape
        if x.shape[:-1].numel() > GATHERED_SHARE * block:
            return self._masked(x, one_hot(index, logits))
        units = index + torch.arange(0, blocks * block, block, device=x.device)
        return gathered_feed_forward(x.flatten(0, 1), units.flatten(0, 1), self.w1, self.w2).view_as(x) + self.b2

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        active = functional.linear(x, self.w1).relu().unflatten(-1, self.controller.shape)
        return functional.linear((active * mask.to(active.dtype)).flatten(-2), self.w2.T, self.b2)


class DenseFeedForward(nn.Module):
    """y = relu(x·W₁)·W₂ + b₂."""

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` → ``[B, T, d]``."""
        return self.w2(self.w1(x).relu())
