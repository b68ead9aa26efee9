"""What the controllers choose: usage per unit, change from token to token, certainty."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tulle.models.scaling_transformer.feed_forward import Controller


@dataclass
class Choices:
    """Counts of one layer's controller over the sequences it saw."""

    blocks: int
    block: int
    tokens: int = 0
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    """How many tokens chose each unit, int64 ``[d_ff/N, N]``."""
    pairs: int = 0
    """Neighbouring tokens, times blocks."""
    changed: int = 0
    """Of these pairs, where the choice differs."""
    certainty: float = 0.0
    """Sum over tokens and blocks of the chosen unit's softmax."""
    shown: Tensor = field(default_factory=lambda: torch.empty(0))
    """The choices of the first sequence seen, ``[T, d_ff/N]``."""

    def add(self, logits: Tensor) -> None:
        """Takes the logits ``[B, T, d_ff/N, N]`` of whole sequences."""
        index = logits.argmax(-1)
        one_hot_sum = torch.zeros(self.blocks, self.block, dtype=torch.int64, device=index.device)
        flat = index.flatten(0, 1)
        one_hot_sum.scatter_add_(1, flat.T, torch.ones_like(flat.T))
        self.counts = one_hot_sum.cpu() if self.tokens == 0 else self.counts + one_hot_sum.cpu()
        if self.tokens == 0:
            self.shown = index[0].cpu()
        self.tokens += len(flat)
        self.pairs += index[:, 1:].numel()
        self.changed += int((index[:, 1:] != index[:, :-1]).sum())
        self.certainty += float(logits.float().softmax(-1).amax(-1).sum())


@contextmanager
def record_choices(model: nn.Module) -> Iterator[dict[str, Choices]]:
    """Within the ``with`` block, what every controller of ``model`` chooses, by the controller's name.

    The choices are those of decoding (argmax, no noise). Rows of a batch are taken as sequences without padding.
    """
    found: dict[str, Choices] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Controller):
            found[name] = Choices(*module.shape)
            handles.append(module.register_forward_hook(lambda _, __, logits, c=found[name]: c.add(logits.detach())))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
