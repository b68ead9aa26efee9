import torch

from oracles.optimal_brain_surgeon import loss
from oracles.problems import layer, state, statistics
from tulle.methods.contract import Statistics
from tulle.methods.prune.magnitude import Magnitude
from tulle.methods.prune.wanda import Wanda


def test_wanda_by_hand() -> None:
    linear = state(torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]]))
    Wanda(sparsity=0.5).apply_linear(linear, Statistics(1, column_norm=torch.tensor([9.0, 1.0, 1.0, 1.0])))
    assert linear.weight.tolist() == [[1.0, 0.0, 0.0, -4.0], [4.0, 3.0, 0.0, 0.0]]


def test_magnitude_scopes_by_hand() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, 6.0, 5.0]])
    for scope, expected in {
        "layer": [[0, 0, 0, 0], [1, 1, 1, 1]],
        "row": [[0, 0, 1, 1], [1, 1, 0, 0]],
    }.items():
        linear = state(w)
        Magnitude(sparsity=0.5, scope=scope).apply_linear(linear, Statistics())  # type: ignore[arg-type]
        assert linear.mask is not None and linear.mask.int().tolist() == expected


def test_wanda_with_equal_norms_is_magnitude_per_row() -> None:
    w, _ = layer(8, 20)
    wanda, magnitude = state(w), state(w)
    Wanda(sparsity=0.5).apply_linear(wanda, Statistics(1, column_norm=torch.ones(20)))
    Magnitude(sparsity=0.5, scope="row").apply_linear(magnitude, Statistics())
    assert torch.equal(wanda.weight, magnitude.weight)


def test_refit_keeps_the_mask_and_lowers_the_error() -> None:
    w, x = layer(16, 40)
    s = statistics(x)
    plain, fitted = state(w), state(w)
    Wanda(sparsity=0.5).apply_linear(plain, s)
    Wanda(sparsity=0.5, refit=True).apply_linear(fitted, s)
    assert torch.equal(plain.mask, fitted.mask)  # type: ignore[arg-type]
    matrix = s.hessian.matrix  # type: ignore[union-attr]
    assert loss(w, fitted.weight, matrix) < 0.7 * loss(w, plain.weight, matrix)


def test_wanda_asks_for_no_more_than_it_uses() -> None:
    assert Wanda(sparsity=0.5).needs == {"column_norm"}
    assert Wanda(sparsity=0.5, refit=True).needs == {"column_norm", "hessian"}
