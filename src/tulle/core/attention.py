"""Softmax attention over whole sequences, compiled: what calibration spends most of a long forward pass in."""

from __future__ import annotations

import torch
from torch import Tensor

from tulle import _native
from tulle.core.statistics import bfloat16_bits

WIDEST = 256
"""Channels of the widest head that the compiled attention takes."""


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, scale: float | None = None) -> Tensor:
    """Causal softmax attention ``[B, H, T, head_dim]`` in bfloat16; k and v ``[B, H_kv, T, head_dim]``.

    Block by block with an online softmax (Dao et al. 2022, "FlashAttention", algorithm 1); scores and sums are
    float32, probabilities bfloat16, as in torch's. A token sees ``window`` tokens, itself included; blocks that nobody
    sees are left out. Channels must lie side by side. The output lies in memory as ``[B, T, H, head_dim]``. The result
    does not depend on the number of threads. Needs what :func:`takes` asks for.
    """
    batch, heads, length, width = q.shape
    out = torch.empty(batch, length, heads, width, dtype=q.dtype).transpose(1, 2)
    _native.flash_attention(
        bfloat16_bits(q),
        bfloat16_bits(k),
        bfloat16_bits(v),
        bfloat16_bits(out),
        window=length if window is None else window,
        scale=width**-0.5 if scale is None else scale,
        threads=torch.get_num_threads(),
    )
    return out


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled attention takes these: bfloat16 without gradients on a CPU with AVX-512 BF16."""
    return (
        all(
            x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and x.stride(-1) == 1
            and not (x.requires_grad and torch.is_grad_enabled())
            for x in (q, k, v)
        )
        and q.numel() > 0
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 16 == 0
        and q.shape[-1] <= WIDEST
        and _native.has_flash_attention()
    )
