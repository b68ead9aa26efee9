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


@pytest.mark.parametrize("damping", [0.01, 1e-12])
def test_eigen(damping: float) -> None:
    """H + λI = SQΛQᵀS with a unit diagonal in between; a singular H has no eigenvalue below 0, rounding or not."""
    _, x = layer(1, 24, tokens=200 if damping > 1e-6 else 5)
    h = Hessian.zeros(24)
    h.add(x)
    found = h.eigen(damping)
    scaled = found.vectors.double() * found.values.double() @ found.vectors.double().T
    expected = h.damped(damping).double()
    torch.testing.assert_close(found.scale.double().square(), expected.diagonal(), rtol=1e-6, atol=0)
    size = found.scale.double()
    torch.testing.assert_close(scaled, expected / size / size[:, None], rtol=0, atol=1e-5)
    assert bool((found.values >= 0).all()) and bool((found.values.diff() >= 0).all())
    assert h.eigen(damping) is found
    if damping < 1e-6:
        assert int((found.values < 1e-5).sum()) == 24 - 5


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    """By hand, with a dead channel: it gets 1, and does not count."""
    h = Hessian(torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]]), tokens=1)
    assert h.damped(0.5).tolist() == [[3.5, 1.0, 0.0], [1.0, 5.5, 0.0], [0.0, 0.0, 1.0]]
    assert h.dead.tolist() == [False, False, True]
    assert h.matrix.diagonal().tolist() == [2.0, 4.0, 0.0]
    assert Hessian.zeros(2).damped(0.5).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_solve() -> None:
    _, x = layer(1, 24)
    h = Hessian.zeros(24)
    h.add(x)
    right = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.solve(h.damped(0.01).double(), right.double().T).T
    torch.testing.assert_close(h.solve(right, 0.01).double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_added_drops_what_was_factorised() -> None:
    _, x = layer(1, 12)
    h = Hessian.zeros(12)
    h.add(x[:30])
    before = h.factor(0.01), h.eigen(0.01)
    h.add(x[30:])
    assert h.factor(0.01) is not before[0] and h.eigen(0.01) is not before[1]


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
