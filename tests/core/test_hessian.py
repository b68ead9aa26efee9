import pytest
import torch

from oracles.problems import layer
from tulle.core.hessian import Hessian
from tulle.errors import UserError


def test_accumulation_is_the_mean_over_all_tokens() -> None:
    _, x = layer(1, 12, tokens=100)
    h = Hessian.zeros(12)
    for part in x.split([1, 30, 69]):
        h.add(part)
    torch.testing.assert_close(h.matrix.double(), 2 * x.double().T @ x.double() / 100, rtol=1e-5, atol=1e-5)
    assert h.tokens == 100


@pytest.mark.parametrize("descending", [False, True])
def test_factor(descending: bool) -> None:
    _, x = layer(1, 24)
    h = Hessian.zeros(24)
    h.add(x)
    factor = h.factor(0.01, descending)
    ordered = h.damped(0.01)[factor.order][:, factor.order].double()
    u = factor.upper.double()
    torch.testing.assert_close(u.T @ u @ ordered, torch.eye(24).double(), rtol=0, atol=1e-4)
    assert torch.equal(u, u.triu())
    diagonal = h.matrix.diagonal()[factor.order]
    assert bool((diagonal.diff() <= 0).all()) if descending else torch.equal(factor.order, torch.arange(24))
    assert h.factor(0.01, descending) is factor


def test_singular_hessian_escalates_and_says_so() -> None:
    h = Hessian.zeros(16)
    h.add(torch.ones(50, 16) * 100)
    factor = h.factor(1e-9)
    assert factor.damping > 1e-9
    assert h.remarks(1e-9, factor.damping) == [
        f"singular Hessian: damping raised from 1e-09 to {factor.damping:g} of its mean diagonal"
    ]


def test_regular_hessian_has_no_remarks() -> None:
    _, x = layer(1, 8)
    h = Hessian.zeros(8)
    h.add(x)
    assert h.remarks(0.01, h.factor(0.01).damping) == []


def test_infinite_activations_are_refused() -> None:
    h = Hessian.zeros(4)
    h.add(torch.full((2, 4), torch.inf))
    with pytest.raises(UserError, match="NaN or Inf"):
        h.factor(0.01)


def test_indefinite_beyond_all_damping_is_refused() -> None:
    h = Hessian(-torch.eye(4), tokens=1)
    with pytest.raises(UserError, match="singular one of size 4"):
        h.factor(0.01)
