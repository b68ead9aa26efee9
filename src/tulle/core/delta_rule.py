"""The gated delta rule: Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule".

A state S ``[d_k, d_v]`` per head forgets by e^{g_t}, takes back what it holds under the key and writes the value:

    S' = e^{g_t}·S_{t−1},   u_t = β_t·(v_t − S'ᵀ·k_t),   S_t = S' + k_t·u_tᵀ,   o_t = S_tᵀ·q_t.

Within a chunk that begins with the state S, with G_i = Σ_{j≤i} g_j and D_ij = e^{G_i − G_j}, all u are the solution of
a unit lower triangular system (the WY form of section 3.3):

    (I + A)·U = diag(β)·(V − diag(e^G)·K·S),   A_ij = β_i·D_ij·k_i·k_j  (j < i),
    O = diag(e^G)·Q·S + (QKᵀ ⊙ D)·U  (j ≤ i),   S ← e^{G_C}·S + Σ_j e^{G_C − G_j}·k_j·u_jᵀ,

the last line being that of a state space model (:mod:`tulle.core.state_space`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tulle.core.state_space import decay, read_and_write

CHUNK = 64


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = CHUNK) -> Tensor:
    """o ``[B, H, T, d_v]`` of q and k ``[B, H, T, d_k]``, v ``[B, H, T, d_v]``, g ≤ 0 and β ``[B, H, T]``, from a state
    of zeros; float32."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    found = []
    parts = zip(*(x.split(chunk, 2) for x in (q, k, v)), *(x.split(chunk, 2) for x in (g, beta)), strict=True)
    for one_q, one_k, one_v, one_g, one_beta in parts:
        out, state = _chunk(one_q, one_k, one_v, one_g, one_beta, state)
        found.append(out)
    return torch.cat(found, 2)


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """O of a chunk, and the state behind it."""
    total = g.cumsum(-1)
    since, between = total.exp()[..., None], decay(total)
    system = (k @ k.transpose(-1, -2) * between * beta[..., None]).tril(-1)
    wanted = beta[..., None] * (v - since * (k @ state))
    u = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    return read_and_write(q, k, u, total, between, state)
