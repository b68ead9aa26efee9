"""The compiled attention against float64, on every kind of edge."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tulle import _native
from tulle.core.attention import flash_attention, takes
from tulle.models.attention import attend

needs_kernel = pytest.mark.skipif(not _native.has_flash_attention(), reason="this CPU has no products of bfloat16")

# (batch, heads, KV heads, tokens, head_dim): tokens around the six rows of a tile, the 48 of a task, the 64 and 128
# keys of half a block and a block; heads of less and more than the 64 channels that are multiplied together.
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 1, 5, 32),
    (1, 4, 2, 6, 64),
    (1, 2, 2, 49, 80),
    (1, 2, 1, 64, 112),
    (2, 2, 1, 127, 128),
    (1, 2, 1, 128, 64),
    (1, 3, 3, 131, 48),
    (1, 1, 1, 300, 256),
]


def heads(shape: tuple[int, int, int, int, int], size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as projections give them, channels and heads side by side."""
    batch, query, shared, tokens, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v = (
        torch.randn(batch, tokens, n, width, generator=generator).mul(size).bfloat16().transpose(1, 2)
        for n in (query, shared, shared)
    )
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in float64, and the same of |v|."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    tokens = q.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - (window or tokens))
    p = (q.double() @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    return p @ v, p @ v.abs()


def is_near(found: Tensor, wanted: Tensor, sizes: Tensor) -> bool:
    """Probabilities and outputs are rounded to 8 bits: 2⁻⁸ of each at most."""
    return bool(((found.double() - wanted).abs() <= 2.0**-8 * (sizes + wanted.abs()) + 2e-5 * sizes).all())


@needs_kernel
@pytest.mark.parametrize("window", [None, 1, 7, 128, 150, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_float64(shape: tuple[int, int, int, int, int], window: int | None) -> None:
    q, k, v = heads(shape)
    for scale in (None, 0.31):
        found = flash_attention(q, k, v, window, scale)
        wanted, sizes = exact(q, k, v, window, scale or shape[-1] ** -0.5)
        assert found.dtype == torch.bfloat16 and found.shape == q.shape
        assert is_near(found, wanted, sizes)


@needs_kernel
def test_large_scores_stay_finite() -> None:
    q, k, v = heads((1, 2, 1, 200, 64), 100.0)
    wanted, sizes = exact(q, k, v, None, 0.125)
    found = flash_attention(q, k, v)
    # Scores of 10⁵ lose what float32 sums of 64 products lose.
    assert bool(((found.double() - wanted).abs() <= 0.05 * sizes).all())


@needs_kernel
def test_blocks_of_the_decoder_use_it() -> None:
    q, k, v = heads((1, 4, 2, 50, 32))
    assert torch.equal(attend(q, k, v, 9), flash_attention(q, k, v, 9))


@pytest.mark.parametrize("window", [None, 40])
def test_attend_of_bfloat16_is_near_that_of_float32(window: int | None) -> None:
    q, k, v = heads((2, 4, 2, 150, 32))
    wanted = attend(q.float(), k.float(), v.float(), window)
    assert is_near(attend(q, k, v, window), *exact(q, k, v, window, 32**-0.5))
    assert torch.allclose(wanted.double(), exact(q, k, v, window, 32**-0.5)[0], atol=1e-5)


@needs_kernel
def test_what_it_does_not_take_is_left_to_torch() -> None:
    q, k, v = heads((1, 2, 1, 8, 32))
    assert takes(q, k, v)
    assert not takes(q.float(), k.float(), v.float())
    assert not takes(q[..., :24], k[..., :24], v[..., :24])
    assert not takes(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    assert not takes(q, k, v.mT.contiguous().mT)
    learned = q.detach().requires_grad_()
    assert not takes(learned, k, v)
    attend(learned, k, v).float().sum().backward()
    assert learned.grad is not None
    with torch.no_grad():
        assert takes(learned, k, v)


@needs_kernel
def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = heads((1, 4, 2, 8, 32))
    for changed in ((q, k[:, :, :7], v), (q, k, v[:, :1]), (q[:, :3], k, v), (q, k, v[..., :16])):
        with pytest.raises(ValueError, match="expected"):
            flash_attention(*changed)
    with pytest.raises(ValueError, match="window"):
        flash_attention(q, k, v, 0)


DIGEST = """
import hashlib, torch
from tests.core.test_attention import heads
from tulle.core.attention import flash_attention
found = flash_attention(*heads((2, 3, 1, 300, 64)), 200)
print(hashlib.sha256(found.view(torch.int16).numpy().tobytes()).hexdigest())
"""


@needs_kernel
def test_threads_do_not_change_the_result() -> None:
    wanted = flash_attention(*heads((2, 3, 1, 300, 64)), 200)
    digest = hashlib.sha256(wanted.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
    for threads in ("1", "3"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        found = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True)
        assert found.stdout.strip() == digest, found.stderr


def test_softmax_of_torch_is_what_exact_computes() -> None:
    q, k, v = (x.double() for x in heads((1, 2, 2, 20, 16)))
    wanted = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(exact(q, k, v, None, 0.25)[0], wanted)
