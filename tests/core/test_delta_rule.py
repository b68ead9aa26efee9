"""The gated delta rule in chunks against its recurrence, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tulle.core.delta_rule import gated_delta_rule


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state, found = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[2]):
        state = g[:, :, t].exp()[..., None, None] * state
        held = torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], beta[:, :, t, None] * (v[:, :, t] - held))
        found.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(found, 2)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
@pytest.mark.parametrize("forgets", [0.01, 1.0, 40.0])
def test_chunks_are_the_recurrence(length: int, forgets: float) -> None:
    torch.manual_seed(length)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 3, length, 8).double(), dim=-1) for _ in range(2))
    v, beta = torch.randn(2, 3, length, 5).double(), torch.rand(2, 3, length).double()
    g = -forgets * torch.rand(2, 3, length).double()
    expected = recurrence(q, k, v, g, beta)
    for chunk in (16, 64):
        torch.testing.assert_close(gated_delta_rule(q, k, v, g, beta, chunk), expected, rtol=1e-9, atol=1e-11)
    single = gated_delta_rule(*(x.float() for x in (q, k, v, g, beta)))
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)
