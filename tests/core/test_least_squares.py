import pytest
import torch

from oracles.optimal_brain_surgeon import loss
from oracles.problems import layer
from tulle.core.least_squares import refit, refit_exact, refit_iterative


def problem(columns: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w, x = layer(12, columns)
    mask = torch.rand(12, columns, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0] = False  # a row without a kept weight
    mask[1] = True  # and one that keeps all
    return w, mask, x


def test_exact_is_lstsq_of_each_row() -> None:
    w, mask, x = problem()
    hessian = (x.T.double() @ x.double()).float()
    fitted = refit_exact(w, mask, hessian)
    for row in range(12):
        kept = mask[row]
        y = x.double() @ w[row].double()
        expected = torch.linalg.lstsq(x.double()[:, kept], y[:, None]).solution[:, 0]
        # float32 entries of H limit the agreement.
        torch.testing.assert_close(fitted[row, kept].double(), expected, rtol=1e-4, atol=1e-4)
        assert not fitted[row, ~kept].any()


def test_iterative_equals_exact() -> None:
    w, mask, x = problem()
    hessian = x.T @ x / len(x) + 0.05 * torch.eye(40)
    exact, iterative = refit_exact(w, mask, hessian), refit_iterative(w, mask, hessian, tolerance=1e-6)
    torch.testing.assert_close(iterative, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_stopping_early_is_safe(steps: int) -> None:
    w, mask, x = problem()
    hessian = x.T @ x / len(x)
    start = w * mask
    assert loss(w, refit_iterative(w, mask, hessian, start, steps=steps), hessian) < loss(w, start, hessian)


def test_wide_layers_are_iterative() -> None:
    w, x = layer(3, 600, tokens=1200)
    mask = w > 0
    hessian = x.T @ x / len(x) + 0.1 * torch.eye(600)
    fitted = refit(w, mask, hessian)
    assert torch.equal(fitted, refit_iterative(w, mask, hessian))
    assert loss(w, fitted, hessian) < 1.001 * loss(w, refit_exact(w, mask, hessian), hessian)


def test_everything_kept_is_the_target() -> None:
    w, _, x = problem()
    hessian = x.T @ x
    torch.testing.assert_close(refit_exact(w, torch.ones_like(w, dtype=torch.bool), hessian), w, rtol=1e-4, atol=1e-4)
