import pytest
import torch

from oracles.problems import layer, state, statistics
from tulle.errors import UserError
from tulle.methods.contract import Statistics
from tulle.methods.prune.ria import RIA, relative_importance, ria_score
from tulle.methods.prune.wanda import Wanda


def test_score_by_hand() -> None:
    w = torch.tensor([[1.0, -3.0], [-3.0, 1.0], [4.0, 4.0]])
    # Column sums 8 and 8; row sums 4, 4 and 8.
    importance = [[1 / 8 + 1 / 4, 3 / 8 + 3 / 4], [3 / 8 + 3 / 4, 1 / 8 + 1 / 4], [1.0, 1.0]]
    assert relative_importance(w).tolist() == importance
    expected = torch.tensor(importance) * torch.tensor([2.0, 3.0])
    torch.testing.assert_close(ria_score(w, torch.tensor([4.0, 9.0])), expected)
    torch.testing.assert_close(ria_score(w, torch.tensor([2.0, 3.0]), 1.0), expected)


def test_mask_by_hand() -> None:
    """Column 0 holds one weight, which is small; Wanda drops it, and with it the channel."""
    w = torch.tensor([[1.0, 2.0, 3.0], [0.0, 9.0, 9.0], [0.0, 9.0, 9.0]])
    ria, wanda = state(w), state(w)
    norms = Statistics(1, column_norm=torch.ones(3))
    RIA(sparsity=1 / 3).apply_linear(ria, norms)
    Wanda(sparsity=1 / 3).apply_linear(wanda, norms)
    assert ria.weight.tolist() == [[1.0, 0.0, 3.0], [0.0, 9.0, 9.0], [0.0, 9.0, 9.0]]
    assert wanda.weight[0].tolist() == [0.0, 2.0, 3.0]


def test_power_weighs_the_activations() -> None:
    w = torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    kept = {}
    for power in (0.0, 0.5):
        linear = state(w)
        RIA(sparsity=0.5, power=power).apply_linear(linear, Statistics(1, column_norm=torch.tensor([9.0, 1.0])))
        assert linear.mask is not None
        kept[power] = linear.mask.int().tolist()
    assert kept == {0.0: [[0, 1], [1, 0]], 0.5: [[1, 0], [1, 0]]}


def test_zero_rows_and_columns_stay_finite() -> None:
    w, _ = layer(6, 8)
    w[2], w[:, 5] = 0, 0
    assert bool(relative_importance(w).isfinite().all()) and not relative_importance(w)[2].any()


def test_dead_channels_go_first() -> None:
    w, x = layer(8, 16)
    x[:, [3, 9]] = 0
    linear = state(w * 10)
    RIA(sparsity=0.25).apply_linear(linear, statistics(x))
    assert linear.mask is not None and not linear.mask[:, [3, 9]].any()


@pytest.mark.parametrize("power", [-0.5, float("nan"), float("inf")])
def test_impossible_power(power: float) -> None:
    with pytest.raises(UserError, match="expected a power >= 0"):
        RIA(sparsity=0.5, power=power)


def test_asks_for_no_more_than_it_uses() -> None:
    assert RIA(sparsity=0.5).needs == {"column_norm"}
    assert RIA(sparsity=0.5, refit=True).needs == {"column_norm", "hessian"}
