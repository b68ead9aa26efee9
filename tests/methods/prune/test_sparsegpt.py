"""SparseGPT against the paper's update written naively, and its limits."""

import pytest
import torch

from oracles.optimal_brain_surgeon import loss, obs_sweep
from oracles.problems import layer, state, statistics
from tulle.core.hessian import Hessian
from tulle.core.masks import Pattern
from tulle.core.sweep import sweep
from tulle.methods.prune.magnitude import Magnitude
from tulle.methods.prune.sparsegpt import SparseGPT, sparsegpt


def hessian_of(x: torch.Tensor) -> Hessian:
    h = Hessian.zeros(x.shape[1])
    h.add(x)
    return h


class NaiveMask:
    """Chooses ŵ_j with the mask of Algorithm 1, from [H_F⁻¹]_jj alone."""

    def __init__(self, hessian: torch.Tensor, width: int, keep: int, rows_together: bool) -> None:
        self.hessian, self.width, self.keep, self.rows_together = hessian.double(), width, keep, rows_together
        self.mask: list[torch.Tensor] = []

    def __call__(self, j: int, w: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if j % self.width == 0:
            columns = range(j, min(j + self.width, w.shape[1]))
            diagonal = torch.stack([torch.linalg.inv(self.hessian[k:, k:])[0, 0] for k in columns])
            score = w[:, j : j + self.width] ** 2 / diagonal
            if self.rows_together:
                chosen = score.flatten().argsort(descending=True)[: self.keep]
                mask = torch.zeros(score.numel(), dtype=torch.bool)
                mask[chosen] = True
                mask = mask.reshape(score.shape)
            else:
                mask = torch.zeros(score.shape, dtype=torch.bool)
                mask.scatter_(1, score.argsort(1, descending=True)[:, : self.keep], True)
            self.mask += list(mask.T)
        return w[:, j] * self.mask[j]


@pytest.mark.parametrize("block", [4, 8, 24])
def test_unstructured_equals_the_closed_form(block: int) -> None:
    w, x = layer(6, 24)
    h = hessian_of(x)
    naive = NaiveMask(h.damped(0.01), block, keep=3 * block, rows_together=True)
    expected = obs_sweep(w, h.damped(0.01), naive)
    got, mask = sparsegpt(w, h.factor(0.01), sparsity=0.5, block=block)
    assert torch.equal(mask, torch.stack(naive.mask, 1))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)  # float32 against float64


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (3, 8), (5, 6)])
@pytest.mark.parametrize("block", [128, 8])
def test_pattern_equals_the_closed_form(n: int, m: int, block: int) -> None:
    w, x = layer(6, 24)
    h = hessian_of(x)
    naive = NaiveMask(h.damped(0.01), m, keep=n, rows_together=False)
    expected = obs_sweep(w, h.damped(0.01), naive)
    got, mask = sparsegpt(w, h.factor(0.01), pattern=Pattern(n, m), block=block)
    assert torch.equal(mask, torch.stack(naive.mask, 1))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_update_crosses_blocks() -> None:
    """A fixed mask, so that blocks of 128 and one block of all columns must give the same weights."""
    w, x = layer(8, 300)
    h = hessian_of(x)
    mask = w.abs() > w.abs().median()
    results = [sparsegpt(w, h.factor(0.01), sparsity=0.0, allowed=mask, block=b)[0] for b in (128, 300)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert not results[0][~mask].any()


@pytest.mark.parametrize("columns_first", [False, True])
def test_the_sweep_leaves_its_weights_alone(columns_first: bool) -> None:
    class Halves:
        def open_block(self, start: int, weight: torch.Tensor) -> None:
            pass

        def column(self, j: int, weight: torch.Tensor) -> torch.Tensor:
            return weight[0] / 2

    w, x = layer(6, 24)
    given = w.T.contiguous().T if columns_first else w.clone()
    found = sweep(given, hessian_of(x).factor(0.01).upper, Halves(), 8)
    assert torch.equal(given, w) and not torch.equal(found, w)
    assert torch.equal(found, sweep(w, hessian_of(x).factor(0.01).upper, Halves(), 8))


def test_identity_hessian_is_magnitude() -> None:
    w, _ = layer(8, 40)
    s = statistics(torch.eye(40) * 40**0.5)
    for settings in ({"sparsity": 0.4}, {"pattern": "2:4"}):
        pruned, baseline = state(w), state(w)
        SparseGPT(**settings).apply_linear(pruned, s)  # type: ignore[arg-type]
        Magnitude(**settings).apply_linear(baseline, s)  # type: ignore[arg-type]
        assert torch.equal(pruned.mask, baseline.mask)  # type: ignore[arg-type]
        torch.testing.assert_close(pruned.weight, baseline.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_exact_count_over_many_blocks(sparsity: float) -> None:
    w, x = layer(7, 50)
    _, mask = sparsegpt(w, hessian_of(x).factor(0.01), sparsity=sparsity, block=8)
    assert int((~mask).sum()) == round(sparsity * 350)


def test_dead_channels_go_first() -> None:
    w, x = layer(8, 16)
    x[:, [3, 9]] = 0
    linear = state(w * 10)
    SparseGPT(sparsity=0.25).apply_linear(linear, statistics(x))
    assert linear.mask is not None and not linear.mask[:, [3, 9]].any()


def test_refit_beats_the_sweep_beats_masking() -> None:
    w, x = layer(32, 64)
    s = statistics(x)
    losses = []
    for method in (Magnitude(sparsity=0.5), SparseGPT(sparsity=0.5, refit=False), SparseGPT(sparsity=0.5)):
        linear = state(w)
        method.apply_linear(linear, s)
        losses.append(loss(w, linear.weight, s.hessian.matrix))  # type: ignore[union-attr]
    assert losses[0] > 1.5 * losses[1] > 1.5 * 1.05 * losses[2]


def test_joint_quantisation_beats_two_roundings() -> None:
    """Rounding in the sweep is compensated; rounding after it is not."""
    from tulle.methods.quantize.round_to_nearest import RoundToNearest

    w, x = layer(32, 64)
    s = statistics(x)
    joint, apart = state(w), state(w)
    SparseGPT(sparsity=0.5, bits=3, refit=False, clip_search=0).apply_linear(joint, s)
    SparseGPT(sparsity=0.5, refit=False).apply_linear(apart, s)
    RoundToNearest(bits=3).apply_linear(apart, s)
    matrix = s.hessian.matrix  # type: ignore[union-attr]
    assert loss(w, joint.weight, matrix) < 0.95 * loss(w, apart.weight, matrix)


def test_refit_of_rounded_weights_is_the_descent() -> None:
    w, x = layer(32, 64)
    s = statistics(x)
    plain, refitted, unswept = state(w), state(w), state(w)
    SparseGPT(sparsity=0.5, bits=3, refit=False).apply_linear(plain, s)
    SparseGPT(sparsity=0.5, bits=3).apply_linear(refitted, s)
    SparseGPT(sparsity=0.5, bits=3, descent=0).apply_linear(unswept, s)
    assert torch.equal(plain.mask, refitted.mask) and torch.equal(plain.weight, unswept.weight)  # type: ignore[arg-type]
    h = s.hessian.damped(0.01)  # type: ignore[union-attr]
    assert loss(w, refitted.weight, h) < 0.97 * loss(w, plain.weight, h)


def test_singular_hessian_is_noted() -> None:
    w, _ = layer(8, 16)
    linear = state(w)
    SparseGPT(sparsity=0.5, damping=1e-9).apply_linear(linear, statistics(torch.ones(64, 16) * 100))
    assert any(note.startswith("singular Hessian: damping raised from 1e-09") for note in linear.notes)
    assert bool(linear.weight.isfinite().all())
