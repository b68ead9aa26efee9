"""Hadamard matrices in whole numbers, and the fast transform against them."""

from __future__ import annotations

import pytest
import torch

from tulle.core.hadamard import hadamard_matrix, hadamard_transform, is_hadamard_order
from tulle.core.paley import field, hadamard_block
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


def test_the_layout_is_what_the_module_says() -> None:
    assert torch.equal(hadamard_matrix(48), torch.kron(hadamard_matrix(12), hadamard_matrix(4)))
    # Type I by hand: the squares modulo 11 are 1, 3, 4, 5, 9, and the diagonal is 1.
    h = hadamard_matrix(12)
    assert h[0].tolist() == [1] * 12 and h[1:, 0].tolist() == [-1] * 11
    assert h[3, 1:].tolist() == [1 if (2 - j) % 11 in (0, 1, 3, 4, 5, 9) else -1 for j in range(11)]
    # Type II is symmetric, type I is not.
    assert torch.equal(hadamard_matrix(36), hadamard_matrix(36).T) and not torch.equal(h, h.T)


@pytest.mark.parametrize(("p", "exponent"), [(11, 1), (3, 2), (3, 3), (7, 3), (5, 2)])
def test_the_field(p: int, exponent: int) -> None:
    """Half of the elements are squares, and Σ_a χ(a)·χ(a + b) = −1 for every b ≠ 0."""
    character, difference = (torch.from_numpy(found) for found in field(p, exponent))
    q = p**exponent
    assert int(character[0]) == 0 and int((character == 1).sum()) == (q - 1) // 2 and int(character.sum()) == 0
    jacobsthal = character[difference].double()  # float64 holds these whole numbers exactly
    assert torch.equal(jacobsthal @ jacobsthal.T, q * torch.eye(q, dtype=torch.float64) - 1)


@pytest.mark.parametrize("width", [896, 18944, 25600, 27648, 29568])
def test_more_widths_of_real_models(width: int) -> None:
    assert hadamard_block(width) == width and is_hadamard_order(width)


def test_a_base_that_costs_as_much_as_a_linear_is_not_taken() -> None:
    assert is_hadamard_order(1284) and hadamard_block(1284) == 12  # 1284 = 1283 + 1


def test_a_spike_spreads_evenly() -> None:
    x = torch.zeros(1, 11008)
    x[0, 77] = 100.0
    torch.testing.assert_close(hadamard_transform(x, 11008).abs(), torch.full_like(x, 100 / 11008**0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = hadamard_transform(x.double(), 384)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(hadamard_transform(x, 384).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(384,), (2, 0, 384), (2, 3, 4, 384)])
def test_any_batch_shape_and_strides(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = hadamard_transform(x, 384)
    torch.testing.assert_close(y, hadamard_transform(x.reshape(-1, 384), 384).reshape(shape), rtol=0, atol=1e-12)
    strided = x.reshape(-1, 384).T.contiguous().T
    torch.testing.assert_close(hadamard_transform(strided, 384), y.reshape(-1, 384), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("channels", "block"), [(384, 5), (384, 0), (96, 128)])
def test_blocks_that_do_not_divide_are_refused(channels: int, block: int) -> None:
    with pytest.raises(UserError, match=f"divides {channels} channels, found {block}"):
        hadamard_transform(torch.zeros(1, channels), block)


@pytest.mark.parametrize("block", [92, 6848])
def test_blocks_without_a_matrix_are_refused(block: int) -> None:
    """92 is a Hadamard order (Baumert, Golomb and Hall 1962), but not by Paley; 6848 takes the product's other path."""
    with pytest.raises(UserError, match=f"expected a Hadamard order .* found {block}"):
        hadamard_transform(torch.zeros(1, block), block)
    with pytest.raises(UserError, match="positive number of channels"):
        hadamard_block(0)
