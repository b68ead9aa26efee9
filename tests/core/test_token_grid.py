"""Per-token grids: by hand, and what must hold for any token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tulle.core.token_grid import TokenGrid

GRIDS = [TokenGrid(b, s, c) for b in (2, 4, 6, 8) for s in (True, False) for c in (1.0, 0.9, 0.5)]


def test_asymmetric_by_hand() -> None:
    # Range [-1, 2], 15 steps of 0.2, zero point 5.
    x = torch.tensor([[-1.0, 2.0, 0.09, 0.5, -0.49]])
    codes, step = TokenGrid(4, symmetric=False).quantise(x)
    assert float(step) == pytest.approx(0.2)
    assert codes.tolist() == [[-5, 10, 0, 2, -2]]


def test_clip_by_hand() -> None:
    # Half of the range [-1, 2]: step 0.1, codes from -5 to 10.
    codes, step = TokenGrid(4, symmetric=False, clip=0.5).quantise(torch.tensor([[-1.0, 2.0, 0.31]]))
    assert float(step) == pytest.approx(0.1)
    assert codes.tolist() == [[-5, 10, 3]]
    codes, step = TokenGrid(4, clip=0.5).quantise(torch.tensor([[-1.4, 0.31]]))
    assert float(step) == pytest.approx(0.1) and codes.tolist() == [[-7, 3]]


def test_a_range_on_one_side_is_widened_to_zero() -> None:
    codes, step = TokenGrid(4, symmetric=False).quantise(torch.tensor([[1.5, 3.0], [-1.5, -3.0]]))
    assert step[:, 0].tolist() == pytest.approx([0.2, 0.2])
    assert codes[0, 1] == 15 and codes[1, 1] == -15


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-20, 1.0, 1e15]))
@settings(max_examples=20, deadline=None)
def test_properties(grid: TokenGrid, seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 33, generator=g) * size * torch.rand(3, 2, 1, generator=g)
    x[0, 0] = 0
    x[1, 0, 5] = 0
    codes, step = grid.quantise(x)
    assert torch.equal(codes, codes.round()) and bool((step > 0).all())
    spread = codes.amax(-1) - codes.amin(-1)
    assert spread.max() <= 2**grid.bits - (2 if grid.symmetric else 1)
    assert not codes[0, 0].any() and codes[1, 0, 5] == 0
    inside = (codes > codes.amin(-1, keepdim=True)) & (codes < codes.amax(-1, keepdim=True))
    error = (x - codes * step).abs()
    # Half a step; the quotient's own rounding adds some 2⁻²⁴ of up to 255 steps.
    assert bool((error <= 0.5001 * step)[inside].all())
    if grid.clip == 1:
        # At the ends of an asymmetric range the rounded zero point may cost half a step more.
        assert bool((error <= (0.5001 if grid.symmetric else 1.0001) * step).all())
    assert torch.equal(grid.fake(x), codes * step)
    # Each token on its own.
    assert torch.equal(grid.fake(x[1:2]), grid.fake(x)[1:2])
