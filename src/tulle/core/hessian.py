"""The layer Hessian H = 2·XᵀX/T, its accumulation, damping and factorisations.

Sources: GPTQ (Frantar et al. 2022, eqs 1-3) and SparseGPT (Frantar & Alistarh 2023, eq. 4), whose sweeps need
the upper Cholesky factor of H⁻¹.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tulle.core.statistics import accumulate_outer
from tulle.errors import UserError

ESCALATIONS = 6
"""A failed factorisation is tried again with ten times the damping, this many times."""
PIVOT = 1e-4
"""Smallest pivot of a Cholesky factor, as a share of the largest, that counts as success: its square is near the
rounding error of float32, where what is left of a pivot is noise.
"""


def check_damping(damping: float) -> None:
    """Raises ``UserError`` unless the damping of a step's settings is positive."""
    if not 0 < damping < float("inf"):
        raise UserError(f"expected a positive damping, found {damping}; the papers use 0.01")


@dataclass
class Hessian:
    """Accumulates H = 2·XᵀX/T in float32, ``[C_in, C_in]``.

    ``add`` takes X ``[T, C_in]``. The factorisations are cached, so that linears that share an input share
    the work.
    """

    matrix: Tensor
    tokens: int = 0
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict, repr=False)
    _eigen: dict[float, Eigen] = field(default_factory=dict, repr=False)

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> Hessian:
        return cls(torch.zeros(channels, channels, device=device))

    @classmethod
    def identity(cls, channels: int, device: torch.device | str = "cpu") -> Hessian:
        """H of inputs of which nothing is known: every channel with mean square 1."""
        return cls(2 * torch.eye(channels, device=device), tokens=1)

    def add(self, x: Tensor) -> None:
        """Adds the tokens X ``[T, C_in]`` to the running mean. X is bfloat16 or float32; bfloat16 is faster."""
        x = x.reshape(-1, x.shape[-1])
        total = self.tokens + x.shape[0]
        accumulate_outer(self.matrix, x, x, alpha=2.0 / total, beta=self.tokens / total)
        self.tokens = total
        self._factors.clear()
        self._eigen.clear()

    @property
    def dead(self) -> Tensor:
        """bool ``[C_in]``: channels that no calibration token ever used (their diagonal is zero)."""
        return self.matrix.diagonal() == 0

    def damped(self, damping: float) -> Tensor:
        """H + damping·mean(diag H)·I, a new float32 tensor; dead channels get 1 on the diagonal."""
        h = self.matrix.clone()
        d = h.diagonal()
        mean = d[~self.dead].mean() if not bool(self.dead.all()) else d.new_ones(())
        d.add_(damping * mean)
        d[self.dead] = 1.0
        return h

    def remarks(self, asked: float, used: float) -> list[str]:
        """Lines for a linear's notes: a damping other than the one asked for, channels without calibration data."""
        lines = []
        if used != asked:
            lines.append(f"singular Hessian: damping raised from {asked:g} to {used:g} of its mean diagonal")
        if dead := int(self.dead.sum()):
            lines.append(f"{dead} input channels were zero on all calibration tokens")
        return lines

    def factor(self, damping: float, descending: bool = False) -> Factor:
        """Upper Cholesky factor U of (H + damping)⁻¹ = UᵀU, with the channel order it is for.

        ``descending`` orders channels by falling diagonal of H (GPTQ's act-order). Damping escalates tenfold
        when the factorisation fails; the value that worked is in the result. Raises ``UserError`` when none
        works.
        """
        key = (damping, descending)
        if key not in self._factors:
            self._factors[key] = _factorise(self, damping, descending)
        return self._factors[key]

    def eigen(self, damping: float) -> Eigen:
        """Eigendecomposition of H + damping, scaled to a unit diagonal. Raises ``UserError`` when H is not finite."""
        if damping not in self._eigen:
            self.check_finite()
            h = self.damped(damping)
            scale = h.diagonal().sqrt()
            values, vectors = torch.linalg.eigh(h / scale / scale[:, None])
            self._eigen[damping] = Eigen(scale, values.clamp_min(0), vectors)
        return self._eigen[damping]

    def check_finite(self) -> None:
        """Raises ``UserError`` for NaN and Inf."""
        if not bool(torch.isfinite(self.matrix).all()):
            raise UserError(
                "expected finite calibration activations, found NaN or Inf in a layer's Hessian; "
                "check the checkpoint and the calibration text"
            )

    def solve(self, right: Tensor, damping: float) -> Tensor:
        """R·(H + damping)⁻¹ for R ``[C_out, C_in]``; damping as in :meth:`factor`."""
        lower, _ = _cholesky(self, damping)
        return torch.cholesky_solve(right.T, lower).T


@dataclass(frozen=True)
class Factor:
    """H + λI = V·Vᵀ with V ``[C_in, C_in]`` upper triangular, channels in the permuted order."""

    feedback: Tensor
    """``[C_in, C_in]``, lower triangular with ones on the diagonal: V_ij/V_jj at row j, column i."""
    pivot: Tensor
    """V_jj ``[C_in]``."""
    order: Tensor
    """``[C_in]``: position i of the sweep is channel ``order[i]``."""
    damping: float
    """The damping, as a share of the mean diagonal, that made the factorisation succeed."""

    @cached_property
    def upper(self) -> Tensor:
        """U = V⁻¹ ``[C_in, C_in]``, upper triangular, (H + λI)⁻¹ = UᵀU in the permuted order."""
        return _inverse_upper(self.feedback.T * self.pivot)


@dataclass(frozen=True)
class Eigen:
    """S⁻¹(H + λI)S⁻¹ = QΛQᵀ with S = diag(H + λI)^½."""

    scale: Tensor
    """Diagonal of S, ``[C_in]``."""
    values: Tensor
    """Λ ``[C_in]``, rising, >= 0."""
    vectors: Tensor
    """Q ``[C_in, C_in]``, one eigenvector per column."""


def _factorise(hessian: Hessian, damping: float, descending: bool) -> Factor:
    """V from one factorisation: with rows and columns reversed, H = M·Mᵀ, M lower; reversed again, H = V·Vᵀ with V
    upper. Neither H⁻¹ nor U = V⁻¹ is formed.
    """
    order = torch.arange(hessian.matrix.shape[0], device=hessian.matrix.device)
    if descending:
        order = torch.argsort(hessian.matrix.diagonal(), descending=True, stable=True)
    lower, share = _cholesky(hessian, damping, order.flip(0))
    feedback = lower.T.flip(0, 1)  # row j holds V_ij
    pivot = feedback.diagonal().clone()
    feedback /= pivot[:, None]
    return Factor(feedback, pivot, order, share)


LEAF = 64
"""Widest triangle that is inverted at once."""


def _inverse_upper(v: Tensor) -> Tensor:
    """V⁻¹ of an upper triangular V, by halves: [[A, B], [0, D]]⁻¹ = [[A⁻¹, −A⁻¹·B·D⁻¹], [0, D⁻¹]].

    Nearly all of it is products of matrices, and no zeros are multiplied but those of A⁻¹ and D⁻¹.
    """
    inverse = torch.zeros_like(v)

    def fill(start: int, end: int) -> None:
        if end - start <= LEAF:
            identity = torch.eye(end - start, dtype=v.dtype, device=v.device)
            inverse[start:end, start:end] = torch.linalg.solve_triangular(v[start:end, start:end], identity, upper=True)
            return
        middle = (start + end) // 2
        fill(start, middle)
        fill(middle, end)
        left, right = slice(start, middle), slice(middle, end)
        inverse[left, right] = (inverse[left, left] @ v[left, right] @ inverse[right, right]).neg_()

    fill(0, len(v))
    return inverse


def _cholesky(hessian: Hessian, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the damped H in the given channel order, and the damping that made it succeed."""
    hessian.check_finite()
    share = damping
    for _ in range(ESCALATIONS + 1):
        h = hessian.damped(share)
        if order is not None:
            h = h[order][:, order]
        lower, info = torch.linalg.cholesky_ex(h)
        # A pivot lost to rounding would only show in the inverse.
        if int(info) == 0 and bool(lower.diagonal().min() > PIVOT * lower.diagonal().max()):
            return lower, share
        share = max(share, 1e-4) * 10
    raise UserError(
        f"expected an invertible Hessian, found a singular one of size {hessian.matrix.shape[0]} even with damping "
        f"{share / 10:g} of its mean diagonal; use more or longer calibration samples"
    )
