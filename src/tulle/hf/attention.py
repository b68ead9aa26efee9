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

from tulle.core.head_grids import HeadGrids
from tulle.core.token_grid import TokenGrid
from tulle.format.spec import AttentionSpec, HeadSpec

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


def _grid(head: HeadSpec | None) -> TokenGrid | None:
    return None if head is None else TokenGrid(head.bits, head.symmetric, head.clip)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    grids = getattr(module, "tulle_head_grids", None)
    if grids is not None:
        query, key, value = grids(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(IMPLEMENTATION, _forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
