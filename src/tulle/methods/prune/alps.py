"""ALPS: Meng, Behdin, Wang, Mazumder 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models" (NeurIPS).

The layer's problem, min tr((W* − D)H(W* − D)ᵀ) over D with k kept entries, is split into W = D and solved by ADMM on

    ½·tr((W* − W)H(W* − W)ᵀ) + ⟨V, W − D⟩ + ρ/2·‖W − D‖²:

    W ← (W*H − V + ρD)·(H + ρI)⁻¹,   D ← the k largest |W + V/ρ|,   V ← V + ρ(W − D).

One eigendecomposition H = QΛQᵀ serves every ρ. H is scaled to a unit diagonal first, W to W·diag(H)^½, so that sizes
of weights are compared as Wanda compares them. Every 3 iterations ρ grows, the faster the more of the support changed
since (by 1 + 3g from 0.1·k entries on, 1 + 2g from 0.005·k on, else 1 + g; the paper's g is 0.1), and ADMM ends when it
did not change at all. Then the weights are fitted to the support.

Departures:
- ``growth`` g is 0.02: about 130 iterations in place of 45, which are cheap against what they gain.
- The fit is exact (core.least_squares), while the paper stops conjugate gradients after a few steps; ``swaps`` improves
  the support for it.
- ``scope: row`` keeps k entries in every output row, where the paper compares over the layer.
- Channels without calibration data are pruned first, and a mask that exists is kept: its pruned entries count towards
  the sparsity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.hessian import Eigen
from tulle.core.masks import Scope, check_sparsity, keep, within
from tulle.errors import UserError
from tulle.methods.contract import LinearState, Statistic, Statistics
from tulle.methods.pruner import Pruner

UPDATE_EVERY = 3
"""Iterations between two values of ρ."""
GROWTH = ((0.1, 3), (0.005, 2), (0.0, 1))
"""(share of k that changed, multiple of the least growth of ρ)."""


def alps(
    target: Tensor,
    eigen: Eigen,
    project: Callable[[Tensor], Tensor],
    rho: float = 0.1,
    growth: float = 0.02,
    iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    """D and its support (bool), ``[C_out, C_in]``, for W* ``[C_out, C_in]``; ``project`` gives the mask of what to keep
    for sizes >= 0 ``[C_out, C_in]``.
    """
    q, values = eigen.vectors, eigen.values
    w_star = target * eigen.scale
    right = (w_star @ q * values) @ q.T
    d, v = w_star, torch.zeros_like(w_star)
    mask = project(d.abs())
    before, kept = mask, max(int(mask.sum()), 1)
    # One product with (H + ρI)⁻¹ in place of two with Q, where that pays for its making at every new ρ.
    whole = UPDATE_EVERY * len(target) >= len(q)
    inverse = (q / (values + rho)) @ q.T if whole else None
    for number in range(1, iterations + 1):
        w = right - v + rho * d
        w = (w @ q / (values + rho)) @ q.T if inverse is None else w @ inverse
        z = w + v / rho
        mask = project(z.abs())
        d = z * mask
        v = rho * (z - d)  # V + ρ(W − D)
        if number % UPDATE_EVERY == 0:
            changed = int((mask ^ before).sum())
            if changed == 0:
                break
            rho *= 1 + growth * next(multiple for share, multiple in GROWTH if changed >= share * kept)
            before = mask
            if inverse is not None:
                inverse = (q / (values + rho)) @ q.T
    return d / eigen.scale, mask


@dataclass(frozen=True)
class ALPS(Pruner):
    """Prunes by ADMM on the layer's error."""

    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    refit: bool = True
    """Fit the kept weights exactly; False leaves ADMM's D."""
    scope: Scope = "layer"
    """Weights are compared over the whole matrix or within each output row; no effect on a pattern."""
    rho: float = 0.1
    """First ρ, for H of unit diagonal."""
    growth: float = 0.02
    """Least growth of ρ; the paper's 0.1 ends after a third of the iterations with 1 % more error."""
    iterations: int = 300
    """ADMM iterations at the most; it ends by itself when the support stands still, after about 130 of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho < float("inf"):
            raise UserError(f"expected a positive rho, found {self.rho}; the paper starts at 0.1")
        if not 0 < self.growth < float("inf"):
            raise UserError(f"expected a positive growth, found {self.growth}; the paper's is 0.1, slower is better")
        if self.iterations < 1:
            raise UserError(f"expected at least one iteration, found {self.iterations}; 300 is the default")

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        hessian = statistics.hessian
        assert hessian is not None
        pattern = check_sparsity(self.sparsity, self.pattern)
        eigen = hessian.eigen(self.damping)
        linear.notes += hessian.remarks(self.damping, self.damping)

        def project(sizes: Tensor) -> Tensor:
            scores = within(sizes, linear.mask)
            return within(keep(scores, self.sparsity, pattern, self.scope), linear.mask)

        target = linear.weight.masked_fill(hessian.dead, 0.0)  # so that a dead channel's entries are the smallest
        weight, mask = alps(target, eigen, project, self.rho, self.growth, self.iterations)
        weight = torch.where(hessian.dead, linear.weight, weight)
        self.fit(linear, mask, hessian, self.damping, weight)
