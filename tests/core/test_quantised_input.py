"""What stands in front of a compressed linear: the order of its parts, its gradients, and what siblings share."""

from __future__ import annotations

import pytest
import torch

from tulle.core.quantised_input import QuantisedInput
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import Diagonal, Hadamard, run

CHAIN = (Diagonal(torch.linspace(0.5, 2.0, 16)), Hadamard(16))
GRID = TokenGrid(4, symmetric=False)
SELECTION = Selection(keep=6)


def tokens() -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [None, GRID])
@pytest.mark.parametrize("selection", [None, SELECTION])
def test_transformed_then_rounded_then_selected(grid: TokenGrid | None, selection: Selection | None) -> None:
    x = tokens()
    expected = run(CHAIN, x)
    expected = expected if grid is None else grid.fake(expected)
    expected = expected if selection is None else selection.apply(expected)
    assert torch.equal(QuantisedInput(CHAIN, grid, selection)(x), expected)
    half = QuantisedInput(CHAIN, grid, selection)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_gradients_pass_the_rounding() -> None:
    """As if the grid were not there; the numbers are rounded all the same."""
    x = tokens().requires_grad_()
    upstream = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for grid in (GRID, None):
        y = QuantisedInput(CHAIN, grid)(x)
        expected = run(CHAIN, x) if grid is None else grid.fake(run(CHAIN, x))
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        gradients.append(torch.autograd.grad(y, x, upstream)[0])
    torch.testing.assert_close(*gradients)


def test_one_input_is_quantised_once() -> None:
    found = QuantisedInput(CHAIN, GRID)
    x = tokens()
    first = found(x)
    assert found(x) is first and found.pre_hook(None, (x,))[0] is first
    other = found(x.clone())
    assert other is not first and torch.equal(other, first)
    found.forget()
    assert found._seen is None and found._result is None
    assert torch.equal(found(x), first)
