"""ALPS against ADMM written naively, and its limits."""

import pytest
import torch

from oracles.optimal_brain_surgeon import loss
from oracles.problems import layer, state, statistics
from tulle.core.hessian import Hessian
from tulle.core.masks import keep_share, largest
from tulle.errors import UserError
from tulle.methods.prune.alps import ALPS, alps
from tulle.methods.prune.magnitude import Magnitude
from tulle.methods.prune.sparsegpt import SparseGPT


def hessian_of(x: torch.Tensor) -> Hessian:
    h = Hessian.zeros(x.shape[1])
    h.add(x)
    return h


def naive(w: torch.Tensor, h: torch.Tensor, kept: int, rho: float, growth: float, iterations: int) -> torch.Tensor:
    """ADMM in float64 with (H + ρI)⁻¹ inverted afresh; the support of D, the ``kept`` largest of the layer."""
    size = h.double().diagonal().sqrt()
    h, w_star = h.double() / size / size[:, None], w.double() * size
    d, v = w_star, torch.zeros_like(w_star)
    history = []
    for number in range(1, iterations + 1):
        w = (w_star @ h - v + rho * d) @ torch.linalg.inv(h + rho * torch.eye(len(h)))
        z = w + v / rho
        d = torch.where(z.abs() >= z.abs().flatten().sort(descending=True).values[kept - 1], z, 0)
        v = v + rho * (w - d)
        if number % 3 == 0:
            history.append(d != 0)
            start = largest(w_star.abs().flatten(), kept).reshape(w.shape)
            changed = int((history[-1] ^ (history[-2] if len(history) > 1 else start)).sum())
            if changed == 0:
                break
            rho *= 1 + growth * (3 if changed >= 0.1 * kept else 2 if changed >= 0.005 * kept else 1)
    return d / size


@pytest.mark.parametrize("growth,iterations", [(0.1, 7), (0.1, 300), (0.02, 300)])
def test_equals_naive_admm(growth: float, iterations: int) -> None:
    w, x = layer(12, 24)
    h = hessian_of(x)
    expected = naive(w, h.damped(0.01), 144, 0.1, growth, iterations)
    d, mask = alps(w, h.eigen(0.01), lambda z: keep_share(z, 0.5, "layer"), 0.1, growth, iterations)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(d.double(), expected, rtol=1e-3, atol=1e-3)  # float32 against float64


def test_diagonal_hessian_is_wanda_over_the_layer() -> None:
    """Channels that do not interact: what counts is |w|·‖x‖."""
    w, _ = layer(8, 40)
    size = torch.linspace(0.2, 3, 40)
    for settings in ({"sparsity": 0.4}, {"sparsity": 0.4, "scope": "row"}, {"pattern": "2:4"}):
        pruned, baseline = state(w), state(w * size)
        ALPS(damping=1e-6, **settings).apply_linear(pruned, statistics(torch.diag(size)))  # type: ignore[arg-type]
        Magnitude(**settings).apply_linear(baseline, statistics(torch.eye(40)))  # type: ignore[arg-type]
        assert torch.equal(pruned.mask, baseline.mask)  # type: ignore[arg-type]
        torch.testing.assert_close(pruned.weight, w * pruned.mask, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
def test_beats_sparsegpt_and_swaps_beat_it(settings: dict) -> None:
    w, x = layer(32, 64)
    s = statistics(x)
    h = s.hessian.damped(0.01)  # type: ignore[union-attr]
    errors = []
    for method in (SparseGPT(**settings), ALPS(**settings), ALPS(swaps=1, **settings)):
        linear = state(w)
        method.apply_linear(linear, s)
        errors.append(loss(w, linear.weight, h))
    assert errors[0] > 1.1 * errors[1] and errors[1] > 1.0005 * errors[2]


def test_slow_growth_is_better_than_the_papers() -> None:
    w, x = layer(48, 96)
    s = statistics(x)
    errors = []
    for growth in (0.1, 0.02):
        linear = state(w)
        ALPS(pattern="2:4", growth=growth).apply_linear(linear, s)
        errors.append(loss(w, linear.weight, s.hessian.damped(0.01)))  # type: ignore[union-attr]
    assert errors[0] > 1.002 * errors[1]


def test_refit_improves_what_admm_leaves() -> None:
    w, x = layer(16, 40)
    s = statistics(x)
    short, fitted = state(w), state(w)
    ALPS(sparsity=0.5, refit=False, iterations=30).apply_linear(short, s)
    ALPS(sparsity=0.5, iterations=30).apply_linear(fitted, s)
    assert torch.equal(short.mask, fitted.mask)  # type: ignore[arg-type]
    h = s.hessian.damped(0.01)  # type: ignore[union-attr]
    assert loss(w, short.weight, h) > 1.01 * loss(w, fitted.weight, h)


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_exact_counts_with_and_without_a_mask(scope: str) -> None:
    w, x = layer(7, 50)
    for sparsity in (0.1, 0.5, 0.73):
        for mask in (None, w.abs() > 0.1):
            linear = state(w)
            linear.mask = mask
            ALPS(sparsity=sparsity, scope=scope, swaps=1).apply_linear(linear, statistics(x))  # type: ignore[arg-type]
            assert linear.mask is not None
            pruned = (~linear.mask).sum(1)
            if scope == "row":
                already = 0 if mask is None else (~mask).sum(1)
                assert bool(
                    (pruned == torch.maximum(torch.tensor(round(sparsity * 50)), torch.as_tensor(already))).all()
                )
            else:
                already = 0 if mask is None else int((~mask).sum())
                assert int(pruned.sum()) == max(round(sparsity * 350), already)
            assert mask is None or not linear.mask[~mask].any()


@pytest.mark.parametrize("swaps", [0, 1])
def test_dead_channels_go_first_and_keep_their_weights_else(swaps: int) -> None:
    w, x = layer(8, 16)
    w *= 100
    x[:, [3, 9]] = 0
    linear = state(w)
    ALPS(sparsity=0.25, swaps=swaps).apply_linear(linear, statistics(x))
    assert linear.mask is not None and not linear.mask[:, [3, 9]].any()
    few = state(w)
    ALPS(sparsity=1 / 32, scope="row", refit=False).apply_linear(few, statistics(x))  # nothing to prune
    torch.testing.assert_close(few.weight, w, rtol=1e-4, atol=1e-2)


def test_nan_is_refused() -> None:
    w, x = layer(4, 8)
    x[0, 0] = float("nan")
    with pytest.raises(UserError, match="expected finite calibration activations"):
        ALPS(sparsity=0.5).apply_linear(state(w), statistics(x))


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {"growth": 0.0}, {"iterations": 0}], ids=str)
def test_impossible_settings(settings: dict) -> None:
    with pytest.raises(UserError, match="expected (a positive|at least)"):
        ALPS(sparsity=0.5, **settings)
