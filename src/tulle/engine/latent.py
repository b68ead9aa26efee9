"""Latent attention without keys and values: what the linear that gives them becomes.

A head's key is W_k·c and its value W_v·c of a latent c, which all heads share. q·(W_k·c) is (W_kᵀ·q)·c, and Σ p·(W_v·c)
is W_v·(Σ p·c). So c is what has to be kept, and W_k and W_v are multiplied once per query, not once per token of the
past (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2).

W_v keeps its codes. W_kᵀ has the codes of W_k, too: a scale belongs to a row of W_k and a part of its inputs, so that
for every part the query is multiplied with the rows' scales first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.engine.checkpoint import StoredLinear, wide
from tulle.engine.layout import TILE
from tulle.engine.native_model import Floats
from tulle.models.description import LatentAttention

ONE = 0x3F80
"""1 in bfloat16."""


@dataclass(frozen=True)
class AbsorbedLinear:
    """Of ``parts`` equal parts of a latent; rows come in whole tiles."""

    keys: StoredLinear
    """``[heads · parts · tiled(rank / parts), plain_dim]``: W_kᵀ."""
    values: StoredLinear
    """``[heads · tiled(value_dim), rank]``: W_v."""
    factors: Floats | None
    """``[heads · parts · plain_dim]``, what queries are multiplied with for each part; None: 1, and one part."""


def absorbed(stored: StoredLinear, mixer: LatentAttention) -> AbsorbedLinear:
    """``stored`` ``[heads · (plain_dim + value_dim), kv_rank]``: the linear that gives keys and values."""
    both = mixer.plain_dim + mixer.value_dim
    rows = mixer.plain_dim + np.minimum(np.arange(tiled(mixer.value_dim)), mixer.value_dim - 1)
    values = stored.with_rows((np.arange(mixer.heads)[:, None] * both + rows).reshape(-1))
    keys, factors = _keys(stored.with_whole_scales(), mixer)
    return AbsorbedLinear(keys, values, factors)


def tiled(rows: int) -> int:
    """In whole tiles."""
    return -(-rows // TILE) * TILE


def _keys(stored: StoredLinear, mixer: LatentAttention) -> tuple[StoredLinear, Floats | None]:
    """W_kᵀ and its factors."""

    def of_keys(x: NDArray[Any]) -> NDArray[Any]:
        """``[heads, plain_dim, …]``"""
        return x.reshape(mixer.heads, mixer.plain_dim + mixer.value_dim, -1)[:, : mixer.plain_dim]

    codes, bits, scale = stored.values, stored.bits, stored.scale
    mask = None if stored.mask is None else of_keys(stored.mask)
    varying = stored.zero_point is not None
    if bits is None or scale is None or stored.minimum is not None or varying and bits == 8:
        # Floats, or what has no codes with one zero point.
        floats = of_keys(codes if bits is None else stored.floats())
        if mask is not None:
            floats = np.where(mask, floats, floats.dtype.type(0))
        return StoredLinear(_transposed(floats, 1), None if mask is None else _transposed(mask, 1)), None
    parts, zero, found = scale.shape[1], stored.zero, of_keys(codes)
    if stored.zero_point is not None:
        # Of an input, not of an output any more: taken off the codes, which have a bit more then.
        zero = 1 << bits
        own = of_keys(stored.zero_point).astype(np.int16).repeat(mixer.kv_rank // parts, axis=2)
        found, bits = (found + np.int16(zero) - own).astype(np.uint8), bits + 1
    keys = _transposed(found, parts)
    scales = np.full((len(keys), 1), ONE, np.uint16)
    turned = StoredLinear(keys, None if mask is None else _transposed(mask, parts), bits, scales, zero=zero)
    return turned, np.ascontiguousarray(of_keys(wide(scale)).transpose(0, 2, 1)).reshape(-1)


def _transposed(x: NDArray[Any], parts: int) -> NDArray[Any]:
    """``[heads, plain, rank]`` → ``[heads · parts · tiled(rank / parts), plain]``, zeros behind each part."""
    heads, plain, rank = x.shape
    width = rank // parts
    found = np.zeros((heads, parts, tiled(width), plain), x.dtype)
    found[:, :, :width] = x.reshape(heads, plain, parts, width).transpose(0, 2, 3, 1)
    return found.reshape(-1, plain)
