"""Linears that compute with a function of their weight: y = x·f(W)ᵀ + b.

The class of the module is exchanged in place, so that parameters keep their names and their identity: checkpoints,
optimizers and FSDP2 see the model they know. (``torch.nn.utils.parametrize`` would rename every weight.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Rule = Callable[[Tensor], Tensor]
"""W ``[C_out, C_in]`` to f(W), of the same shape."""


class EffectiveLinear(nn.Linear):
    """A linear whose forward pass uses ``rule(weight)``."""

    rule: Rule

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.rule(self.weight), self.bias)


def install(linear: nn.Linear, rule: Rule) -> None:
    """From now on ``linear`` computes with ``rule(weight)``."""
    linear.__class__ = EffectiveLinear
    linear.rule = rule  # type: ignore[assignment]


def remove(linear: nn.Linear) -> None:
    """A plain linear again."""
    linear.__class__ = nn.Linear
    del linear.rule


class StraightThrough(torch.autograd.Function):
    """Forward f(W), given; backward the gradient for f(W) as that for W."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, effective: Tensor) -> Tensor:
        return effective

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
