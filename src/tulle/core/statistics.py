"""Sums of outer products over tokens, [M, N] += Σ_t a_tᵀ·b_t: what the calibration statistics are made of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tulle import _native

PANEL = 384
"""Channels whose products are computed together: narrower panels save work, wider ones run faster."""


def accumulate_outer(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """total ← beta·total + alpha·aᵀ·b for a ``[T, M]`` and b ``[T, N]``; total float32 ``[M, N]``, in place.

    If a is b, total must be symmetric: half of it is computed and mirrored. Sums are float32 in any case. Two bfloat16
    matrices on a CPU with AVX-512 BF16 are multiplied as they are: the products are exact, and the sums as good as
    float32 copies would give, in half the time.
    """
    if takes_bfloat16(total, a, b):
        _native.accumulate_outer(
            total.numpy(),
            bfloat16_bits(a.contiguous()),
            None if a is b else bfloat16_bits(b.contiguous()),
            alpha,
            beta,
            torch.get_num_threads(),
        )
        return
    if a is not b:
        total.addmm_(a.float().T, b.float(), beta=beta, alpha=alpha)
        return
    x = a.float()
    for start in range(0, x.shape[1], PANEL):
        # Of a panel of rows, only what stands on and right of the diagonal.
        end = start + PANEL
        panel = total[start:end]
        panel[:, start:].addmm_(x[:, start:end].T, x[:, start:], beta=beta, alpha=alpha)
        total[end:, start:end] = panel[:, end:].T


def takes_bfloat16(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the compiled product takes these tensors."""
    return (
        a.dtype == b.dtype == torch.bfloat16
        and total.device.type == a.device.type == b.device.type == "cpu"
        and total.dtype == torch.float32
        and total.is_contiguous()
        and _native.has_outer()
    )


def bfloat16_bits(x: Tensor) -> NDArray[np.int16]:
    """A view of bfloat16 as int16, with x's strides: NumPy has no bfloat16."""
    bits: NDArray[np.int16] = x.detach().view(torch.int16).numpy()
    return bits
