"""Fitting a group of linears to the dense model while the compressed model's activations run through it.

A group sees inputs X of the compressed model, while the dense model would have given its linears X̃. With ``target:
dense`` the wanted output is T = X̃·Wᵀ; for ``stream``, o and down also take over the error (H̃ − H) of the residual
stream. The least-squares weight for that,

    W* = argmin ‖T − X·W*ᵀ‖² = W + R·(XᵀX + λI)⁻¹,   R = (T − X·Wᵀ)ᵀ·X = W·(X̃ − X)ᵀX + (H̃ − H)ᵀX,

replaces W before the steps run, and min ‖T − X·Ŵᵀ‖² is then min tr((W* − Ŵ)·H·(W* − Ŵ)ᵀ), which is what GPTQ and
SparseGPT already solve: no method needs to know. (The same aim as GPTAQ, Li et al. 2025, "asymmetric calibration".)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core.statistics import accumulate_outer
from tulle.methods.contract import GroupState


class Mismatch:
    """R ``[C_out, C_in]``, float32, of a group's linears one below the other, summed batch by batch.

    Takes the cheaper of two ways: the cross product (X̃ − X)ᵀX first and W at the end, or, where a group has fewer
    outputs than inputs (down), T − X·Wᵀ of every batch first.
    """

    def __init__(self, weight: Tensor, stream: bool):
        """``weight``: W ``[C_out, C_in]``; ``stream``: whether :meth:`add` is given H̃ − H."""
        self._weight = weight
        outputs, inputs = weight.shape
        self._cross = weight.new_zeros(inputs, inputs) if outputs >= inputs else None
        self._outputs = torch.zeros_like(weight) if stream or self._cross is None else None

    def add(self, wanted: Tensor, x: Tensor, behind: Tensor | None) -> None:
        """Takes X̃ and X ``[T, C_in]`` and, for the residual stream, H̃ − H ``[T, C_out]``, in X's dtype.

        Products are fast in bfloat16. Of a difference it keeps 8 bits, whose rounding errors, at most 2⁻⁸ of each
        element, favour no side and average out over the tokens.
        """
        lag = (wanted - x).to(x.dtype)
        if self._cross is not None:
            accumulate_outer(self._cross, lag, x)
        else:
            lag = lag @ self._weight.to(x.dtype).T
            behind = lag if behind is None else lag + behind
        if self._outputs is not None and behind is not None:
            accumulate_outer(self._outputs, behind, x)

    def result(self) -> Tensor:
        """R."""
        if self._cross is None:
            assert self._outputs is not None
            return self._outputs
        found = self._weight @ self._cross
        return found if self._outputs is None else found + self._outputs


def fit_to_dense(group: GroupState, mismatch: Tensor, damping: float) -> None:
    """Gives each linear W* for W, from R ``[C_out, C_in]``."""
    hessian = group.statistics.hessian
    assert hessian is not None
    # H is 2·XᵀX/T.
    fits = hessian.solve(mismatch * (2.0 / hessian.tokens), damping)
    for linear, fit in zip(group.linears, fits.split([len(x.weight) for x in group.linears]), strict=True):
        linear.weight = linear.weight + fit
