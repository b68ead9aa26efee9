import pytest
import torch

from tulle.core.hadamard import field, hadamard_block, hadamard_matrix, hadamard_transform, is_hadamard_order
from tulle.errors import UserError

WHOLE = [384, 896, 1536, 4096, 4864, 5632, 8960, 11008, 13824, 14336, 18944, 25600, 27648, 29568]
TYPE_1 = [4, 12, 20, 28, 44, 84, 108, 140, 244, 344]
TYPE_2 = [36, 52, 76, 100, 148]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 8, 128, 384, 688, 896, 1536, *TYPE_1, *TYPE_2])
def test_a_hadamard_matrix_in_whole_numbers(n: int) -> None:
    h = hadamard_matrix(n)
    assert h.dtype == torch.int8 and bool((h.abs() == 1).all())
    # Float64 holds these sums exactly, and multiplies fast.
    exact = h.double() @ h.double().T
    assert torch.equal(exact, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("width", WHOLE)
def test_models_get_whole_widths(width: int) -> None:
    assert hadamard_block(width) == width and is_hadamard_order(width)


@pytest.mark.parametrize(("width", "block"), [(6848, 64), (13696, 128), (2730, 2), (9, 1), (1, 1), (1284, 12)])
def test_the_largest_block_of_other_widths(width: int, block: int) -> None:
    """1284 = 1283 + 1 is an order, but its base is larger than a transform should cost."""
    assert hadamard_block(width) == block
    assert width % block == 0


def test_the_layout_is_what_the_module_says() -> None:
    sylvester = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.int8)
    assert torch.equal(hadamard_matrix(4), sylvester)
    assert torch.equal(hadamard_matrix(48), torch.kron(hadamard_matrix(12), sylvester))
    # Type I by hand: the squares modulo 11 are 1, 3, 4, 5, 9.
    h = hadamard_matrix(12)
    assert h[0].tolist() == [1] * 12 and h[1:, 0].tolist() == [-1] * 11
    squares = {1, 3, 4, 5, 9}
    assert h[3, 1:].tolist() == [1 if (2 - j) % 11 in squares | {0} else -1 for j in range(11)]
    # Type II is symmetric.
    assert torch.equal(hadamard_matrix(36), hadamard_matrix(36).T)


@pytest.mark.parametrize(("p", "exponent"), [(11, 1), (3, 2), (3, 3), (7, 3), (5, 2)])
def test_the_field(p: int, exponent: int) -> None:
    """Half of the elements are squares; Σ_a χ(a)·χ(a + b) = −1 for every b ≠ 0 only in a field."""
    character, difference = field(p, exponent)
    q = p**exponent
    assert int(character[0]) == 0 and int((character == 1).sum()) == (q - 1) // 2 and int(character.sum()) == 0
    jacobsthal = character[difference].double()
    assert torch.equal(jacobsthal @ jacobsthal.T, q * torch.eye(q, dtype=torch.float64) - 1)


@pytest.mark.parametrize(
    ("channels", "block"),
    [(8, 4), (96, 12), (256, 128), (256, 256), (384, 384), (1024, 512), (1376, 1376), (1536, 1536), (2304, 2304)],
)
@pytest.mark.parametrize("transpose", [False, True])
def test_fast_is_dense(channels: int, block: int, transpose: bool) -> None:
    x = random(3, 2, channels)
    h = hadamard_matrix(block).double() / block**0.5
    h = h.T if transpose else h
    expected = (x.reshape(-1, block) @ h).reshape(x.shape)
    # Sums of at most 2304 terms of size one in float64.
    torch.testing.assert_close(hadamard_transform(x, block, transpose), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 12, 128, 256, 1376])
def test_norm_is_kept_and_the_transpose_inverts(block: int) -> None:
    x = random(5, 2 * block)
    y = hadamard_transform(x, block)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(hadamard_transform(y, block, transpose=True), x, rtol=0, atol=1e-12)


def test_a_spike_spreads_evenly() -> None:
    x = torch.zeros(1, 11008)
    x[0, 77] = 100.0
    torch.testing.assert_close(hadamard_transform(x, 11008).abs(), torch.full_like(x, 100 / 11008**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    x = random(4, 768, dtype=dtype)
    y = hadamard_transform(x, 384)
    assert y.dtype == dtype and y.shape == x.shape
    expected = hadamard_transform(x.double(), 384)
    # One rounding to the dtype; float32 also rounds its sums, over 32 and 12 terms.
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(384,), (1, 384), (2, 0, 384), (2, 3, 4, 384)])
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    y = hadamard_transform(x, 384)
    assert y.shape == x.shape
    flat = hadamard_transform(x.reshape(-1, 384), 384)
    torch.testing.assert_close(y, flat.reshape(shape), rtol=0, atol=1e-13)


def test_strided_input_and_no_change_to_it() -> None:
    x = random(384, 6).T
    before = x.clone()
    torch.testing.assert_close(hadamard_transform(x, 384), hadamard_transform(x.contiguous(), 384))
    assert torch.equal(x, before)


@pytest.mark.parametrize("block", [12, 256])
def test_differentiable(block: int) -> None:
    x = random(2, 256 if block == 256 else 24).requires_grad_()
    weight = random(*x.shape).flip(0)
    (hadamard_transform(x, block) * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, hadamard_transform(weight, block, transpose=True), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 92, 13696])
def test_refused_orders(n: int) -> None:
    """92 is a Hadamard order (Baumert, Golomb and Hall 1962), but not by Paley."""
    assert not is_hadamard_order(n)
    with pytest.raises(UserError, match=f"expected a Hadamard order .* found {n}; try"):
        hadamard_matrix(n)


@pytest.mark.parametrize(("channels", "block"), [(384, 5), (384, 0), (96, 128)])
def test_refused_blocks(channels: int, block: int) -> None:
    with pytest.raises(UserError, match=f"divides {channels} channels, found {block}"):
        hadamard_transform(torch.zeros(1, channels), block)
    with pytest.raises(UserError, match="expected a Hadamard order"):
        hadamard_transform(torch.zeros(1, 184), 92)
    with pytest.raises(UserError, match="expected a Hadamard order"):
        hadamard_transform(torch.zeros(1, 6848), 6848)
    with pytest.raises(UserError, match="positive number of channels"):
        hadamard_block(0)
