"""Mamba-2's state space model: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms
Through Structured State Space Duality".

A state H ``[N, P]`` per head forgets by e^{g_t} and takes in an outer product; c reads it:

    H_t = e^{g_t}·H_{t−1} + b_t·x_tᵀ,   y_t = H_tᵀ·c_t.

Within a chunk that begins with the state H, with G_i = Σ_{j≤i} g_j and L_ij = e^{G_i − G_j} for j ≤ i (section 6):

    Y = (L ⊙ C·Bᵀ)·X + diag(e^G)·C·H,   H ← e^{G_last}·H + Σ_j e^{G_last − G_j}·b_j·x_jᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


def state_space(x: Tensor, g: Tensor, b: Tensor, c: Tensor, chunk: int = CHUNK) -> Tensor:
    """y ``[B, H, T, P]`` of x ``[B, H, T, P]``, times its step, g ≤ 0 ``[B, H, T]``, and b and c ``[B, H, T, N]``, from
    a state of zeros; float32."""
    state = x.new_zeros(*x.shape[:2], b.shape[-1], x.shape[-1])
    found = []
    for one_x, one_g, one_b, one_c in zip(*(part.split(chunk, 2) for part in (x, g, b, c)), strict=True):
        total = one_g.cumsum(-1)
        out, state = read_and_write(one_c, one_b, one_x, total, decay(total), state)
        found.append(out)
    return torch.cat(found, 2)


def decay(total: Tensor) -> Tensor:
    """L ``[…, C, C]`` of G ``[…, C]``."""
    # Above the diagonal the exponent is positive and may be large.
    return (total[..., :, None] - total[..., None, :]).tril().exp().tril()


def read_and_write(
    c: Tensor, b: Tensor, x: Tensor, total: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Y of a chunk, and the state behind it; ``total`` is G, ``decay`` L."""
    y = total.exp()[..., None] * (c @ state) + (c @ b.transpose(-1, -2) * decay) @ x
    last = total[..., -1:]
    state = last.exp()[..., None] * state + ((last - total).exp()[..., None] * b).transpose(-1, -2) @ x
    return y, state
