"""Hadamard matrices in whole numbers, and the fast transform against them."""

from __future__ import annotations

import pytest
import torch

from tulle.core.hadamard import hadamard_block, hadamard_matrix, hadamard_transform
from tulle.errors import UserError

ORDERS = (1, 2, 4, 8, 12, 16, 20, 28, 36, 44, 52, 60, 64, 76, 84, 108, 128, 140, 172 * 2, 384)


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard_matrix(n).long()
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.long))


def test_powers_of_two_are_sylvesters() -> None:
    assert hadamard_matrix(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize("n", [3, 6, 10, 92 // 2])
def test_impossible_orders(n: int) -> None:
    with pytest.raises(UserError, match=f"found {n}; try blocks of"):
        hadamard_matrix(n)


@pytest.mark.parametrize("width", [384, 1536, 5632, 11008, 13824, 14336, 4864, 8960])
def test_widths_of_real_models_are_mixed_whole(width: int) -> None:
    assert hadamard_block(width) == width


@pytest.mark.parametrize("width", [1, 2, 7, 100, 5 * 128, 9 * 16])
def test_other_widths_take_their_largest_block(width: int) -> None:
    block = hadamard_block(width)
    assert width % block == 0
    hadamard_matrix(block)
    for larger in range(block + 1, width + 1):
        if width % larger == 0:
            with pytest.raises(UserError):
                hadamard_matrix(larger)


@pytest.mark.parametrize(("width", "block"), [(64, 64), (384, 384), (384, 128), (344, 344), (1536, 1536), (96, 12)])
def test_fast_transform_is_the_matrix(width: int, block: int) -> None:
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = hadamard_matrix(block).double() / block**0.5
    expected = (x.reshape(2, 3, -1, block) @ h).reshape(x.shape)
    torch.testing.assert_close(hadamard_transform(x, block), expected)
    torch.testing.assert_close(hadamard_transform(expected, block, transpose=True), x)
    torch.testing.assert_close(expected.norm(dim=-1), x.norm(dim=-1))


def test_dtypes_and_gradients() -> None:
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    assert hadamard_transform(x.bfloat16(), 384).dtype == torch.bfloat16
    torch.testing.assert_close(
        hadamard_transform(x, 384).double(), hadamard_transform(x.double(), 384), atol=1e-5, rtol=0
    )
    y = x.double().requires_grad_(True)
    weight = torch.randn(3, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (hadamard_transform(y, 384) * weight).sum().backward()
    torch.testing.assert_close(y.grad, hadamard_transform(weight, 384, transpose=True))
