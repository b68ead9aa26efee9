"""Quantisers of queries, keys and values: each where it belongs, and a rotation that their products do not see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tulle.core.hadamard import hadamard_matrix
from tulle.core.head_grids import HeadGrids
from tulle.core.token_grid import TokenGrid


def heads(head_dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 5, head_dim, generator=g) for n in (4, 2, 2))  # type: ignore[return-value]


def test_nothing_is_done_unasked() -> None:
    given = heads()
    assert all(torch.equal(a, b) for a, b in zip(HeadGrids()(*given), given, strict=True))


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_each_grid_rounds_its_own(place: str) -> None:
    given, grid = heads(), TokenGrid(4, symmetric=False)
    found = dict(zip(("query", "key", "value"), HeadGrids(**{place: grid})(*given), strict=True))
    for name, x in zip(found, given, strict=True):
        assert torch.equal(found[name], grid.fake(x) if name == place else x)


@pytest.mark.parametrize(("head_dim", "block"), [(16, 16), (12, 12), (24, 24), (6, 2)])
def test_products_do_not_see_the_hadamard(head_dim: int, block: int) -> None:
    """q·H/√b and k·H/√b, in the largest blocks that have a matrix; values stay."""
    q, k, v = heads(head_dim)
    query, key, value = HeadGrids(hadamard=True)(q, k, v)
    h = torch.block_diag(*[hadamard_matrix(block).float() / block**0.5] * (head_dim // block))
    torch.testing.assert_close(query, q @ h)
    torch.testing.assert_close(key, k @ h)
    assert torch.equal(value, v)
    scores = [a @ b.repeat_interleave(2, 1).mT for a, b in ((query, key), (q, k))]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_rounding_comes_after_the_hadamard() -> None:
    q, k, v = heads()
    grid = TokenGrid(4)
    query, key, value = HeadGrids(grid, grid, grid, hadamard=True)(q, k, v)
    rotated = HeadGrids(hadamard=True)(q, k, v)
    for found, x in zip((query, key, value), rotated, strict=True):
        assert torch.equal(found, grid.fake(x))
