"""Quantised queries, keys and values: an attention function of transformers that rounds them per token and head.

What reaches it are queries and keys after RoPE and, with a cache, all keys and values so far. A vector of one token and
head is rounded on its own, so rounding the whole cache again at every step gives the numbers that a cache of codes
would hold. Softmax and products stay in floating point (scaled dot product attention, or the model's own where scores
are capped or there are sinks).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
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
    if settings.get("softcap") is not None or settings.get("s_aux") is not None:
        # Scores that are capped, or that a sink takes part in: the model's own formula.
        eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        mask = _added(attention_mask, query, key)
        return eager(module, query, key, value, mask, **settings)[0], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What is added to scores: the least number where ``mask`` is False; None: causal, the queries being the last."""
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


AttentionInterface.register(IMPLEMENTATION, _forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
