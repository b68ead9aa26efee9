"""Differentiable rounding against the exact grids, and its gradients."""

from __future__ import annotations

import pytest
import torch

from tulle.core.grid import Grid, extremes
from tulle.core.token_grid import TokenGrid
from tulle.methods.learning import WeightClip, fake_quantise, fake_tokens, round_through


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_round_as_the_grid_does(bits: int, symmetric: bool) -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    low, high = extremes(w, Grid(bits, None, symmetric))
    found = fake_quantise(w, low, high, bits, symmetric)
    # core.grid's formulas with the step left in float32: files store it in bfloat16.
    if symmetric:
        step, zero, floor, top = (
            w.abs().amax(1, True) / (2 ** (bits - 1) - 1),
            0,
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
        )
    else:
        step, floor, top = (high - low) / (2**bits - 1), 0, 2**bits - 1
        zero = (-low / step).round()
    expected = (((w / step).round() + zero).clamp(floor, top) - zero) * step
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(found[0].unique()) <= 2**bits


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_on_one_side_is_widened_to_zero(sign: int) -> None:
    w = sign * (torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) + 1)
    low, high = extremes(w, Grid(4, None, False))
    found = fake_quantise(w, low, high, 4, False)
    step = w.abs().amax(1, True) / 15  # from 0 to the largest
    torch.testing.assert_close(found, (w / step).round() * step, rtol=1e-5, atol=1e-6)
    assert not fake_quantise(torch.zeros(6, 1), low, high, 4, False).any()


@pytest.mark.parametrize(
    "grid", [TokenGrid(4, False), TokenGrid(4, False, 0.8), TokenGrid(6), TokenGrid(8, True, 0.9)], ids=str
)
def test_tokens_round_as_the_quantiser_does(grid: TokenGrid) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fake_tokens(x, grid), grid.fake(x), rtol=1e-5, atol=1e-6)


def test_rounding_passes_the_gradient_through() -> None:
    x = torch.tensor([0.2, 1.7], requires_grad=True)
    round_through(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1]


def test_clipped_weights_pull_their_end_out() -> None:
    """One row, one weight beyond the end: widening the range is the only way to lower its error."""
    w = torch.tensor([[0.0, 0.5, -0.5, 4.0]])
    clip = WeightClip(1, 1, learned=True, start=0.0)  # ratio 0.5
    low, high = clip.ranges(w, Grid(4, None, False))
    assert (float(low.detach()), float(high.detach())) == (-0.25, 2.0)
    error = (fake_quantise(w, low, high, 4, False)[0, 3] - 4.0) ** 2
    error.backward()
    assert clip.high.grad is not None and float(clip.high.grad) < 0
