"""Mamba-2's state space model in chunks against its recurrence, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tulle.core.state_space import state_space


def recurrence(x: Tensor, g: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state, found = torch.zeros(*x.shape[:2], b.shape[-1], x.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[2]):
        state = g[:, :, t].exp()[..., None, None] * state + b[:, :, t, :, None] * x[:, :, t, None]
        found.append((state * c[:, :, t, :, None]).sum(-2))
    return torch.stack(found, 2)


@pytest.mark.parametrize("length", [1, 64, 150])
@pytest.mark.parametrize("forgets", [0.01, 40.0])
def test_chunks_are_the_recurrence(length: int, forgets: float) -> None:
    torch.manual_seed(length)
    b, c = (torch.randn(2, 3, length, 8).double() for _ in range(2))
    x, g = torch.randn(2, 3, length, 5).double(), -forgets * torch.rand(2, 3, length).double()
    for chunk in (16, 64):
        torch.testing.assert_close(state_space(x, g, b, c, chunk), recurrence(x, g, b, c), rtol=1e-9, atol=1e-10)
