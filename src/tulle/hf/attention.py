"""Quantised queries, keys and values: an attention function of transformers that rounds them per token and head.

What reaches it are queries and keys after RoPE and, with a cache, all keys and values so far. A vector of one token and
head is rounded on its own, so rounding the whole cache again at every step gives the numbers that a cache of codes
would hold. Softmax and products stay in floating point (scaled dot product attention).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tulle.core.hadamard import hadamard_transform
from tulle.core.paley import hadamard_block
from tulle.core.token_grid import TokenGrid
from tulle.format.spec import AttentionSpec, HeadSpec
from tulle.methods.contract import HeadGrids

IMPLEMENTATION = "tulle"
"""The name for ``attn_implementation``."""


def attach(module: nn.Module, grids: HeadGrids | None) -> None:
    """Gives an attention module its quantisers."""
    module.tulle_head_grids = grids  # type: ignore[assignment]


def grids_of(spec: AttentionSpec | None) -> HeadGrids | None:
    """The quantisers that a file describes."""
    if spec is None:
        return None
    query, key, value = (_grid(head) for head in (spec.query, spec.key, spec.value))
    return HeadGrids(query, key, value, spec.hadamard)


def quantise_heads(grids: HeadGrids, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded queries, keys and values ``[..., head_dim]``."""
    if grids.hadamard:
        block = hadamard_block(query.shape[-1])
        query, key = (hadamard_transform(x, block) for x in (query, key))
    query, key, value = (
        x if grid is None else grid.fake(x)
        for x, grid in ((query, grids.query), (key, grids.key), (value, grids.value))
    )
    return query, key, value


def _grid(head: HeadSpec | None) -> TokenGrid | None:
    return None if head is None else TokenGrid(head.bits, head.symmetric, head.clip)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    grids = getattr(module, "tulle_head_grids", None)
    if grids is not None:
        query, key, value = quantise_heads(grids, query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(IMPLEMENTATION, _forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
