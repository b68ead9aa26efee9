"""Softmax attention of the plain decoder: scores, masks and rotary tables, in torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from tulle.core import attention
from tulle.models.description import Rotary
from tulle.models.rotary import frequencies


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention ``[B, H, T, head_dim]``; k and v ``[B, H_kv, T, head_dim]``, each for H/H_kv heads.
    ``cap``: scores s become cap·tanh(s/cap). ``sinks`` ``[H]``: a score per head that has no value. ``valid``: bool
    ``[B, T]`` of keys that may be seen."""
    if cap is not None or sinks is not None:
        return attention_by_scores(q, k, v, window, scale, cap, sinks, valid)
    if valid is None and attention.takes(q, k, v):
        return attention.flash_attention(q, k, v, window, scale)
    shared, length = q.shape[1] // k.shape[1], q.shape[2]
    if valid is None and (window is None or window >= length):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared > 1)
    if shared > 1:
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    mask = visible(length, window, q.device, valid)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def attention_by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """:func:`attend`, with all scores of a head in memory."""
    length, shared = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    scores = scores.masked_fill(~visible(length, window, q.device, valid), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)), -1)
    return scores.softmax(-1, dtype=torch.float32)[..., :length].to(q.dtype) @ v


def visible(length: int, window: int | None, device: torch.device, valid: Tensor | None = None) -> Tensor:
    """bool ``[T, T]``, or ``[B, 1, T, T]`` with ``valid``: which tokens (last axis) a token sees. Padding sees itself,
    so that it gives numbers."""
    mask = window_mask(length, length if window is None else window, device)
    if valid is None:
        return mask
    return mask & valid[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=device)


def positions_of(valid: Tensor) -> tuple[Tensor, int]:
    """Positions ``[B, T]`` of real tokens in their sequences, 0 of padding, and the longest sequence's length."""
    counted = valid.long().cumsum(-1)
    return (counted - 1).clamp(min=0), int(counted[:, -1].max())


def at(positions: Tensor | None, table: Tensor) -> Tensor:
    """Rows of a table ``[T, …]`` by position: ``[B, 1, T, …]``, or all of them in order."""
    return table if positions is None else table[positions][:, None]


@lru_cache(maxsize=4)
def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool ``[T, T]``: token i sees tokens i − window + 1 … i."""
    with torch.inference_mode(False):
        return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x ``[…, T, head_dim]``, its first ``dim`` channels rotated by the tables ``[T, dim]``: channels i and i + dim/2
    together, or, ``interleaved``, channels 2i and 2i + 1."""
    dim = cos.shape[-1]
    x, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        cos, sin = (table[..., : dim // 2].repeat_interleave(2, -1) for table in (cos, sin))
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        left, right = x.chunk(2, dim=-1)
        other = torch.cat((-right, left), dim=-1)
    rotated = x * cos + other * sin
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


@lru_cache(maxsize=4)
def position_scale(beta: float, original: int, length: int, device: torch.device) -> Tensor:
    """1 + β·ln(1 + ⌊p/original⌋) ``[T, 1]`` of positions p = 0 … T − 1."""
    with torch.inference_mode(False):
        steps = torch.arange(length, device=device) // original
        return (1 + beta * torch.log(1 + steps.float()))[:, None]


@lru_cache(maxsize=16)
def rotary_table(
    rotary: Rotary, length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, dim]`` of positions 0 … T − 1, computed in float32."""
    found, scaling = frequencies(rotary, length)
    with torch.inference_mode(False), torch.no_grad():
        angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.from_numpy(found)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(device, dtype), (angles.sin() * scaling).to(device, dtype)
