"""Attention with dense projections, or with sparse ones (paper, section 3.2).

    multiplicative layer   y[s,m] = Σ_i x_i·D[s,i]·E[m,i]         S modules of M = d/S, D [S, d], E [M, d]
    q, k                   causal 3×3 convolutions of y over (length × modules), M channels
    v                      causal 3×1 convolution, along the length alone

One multiplicative layer feeds all three, and no output projection follows. Any permutation of x is a multiplicative
layer (D picks the module, E the place in it). As a matrix it is the Khatri-Rao product of D and E, of d·(S + M)
parameters; multiplying a token by its factors reads only those, while for many tokens it is cheaper to form the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from tulle.models.scaling_transformer.configuration import ScalingTransformerConfig

LENGTH = 3
"""Tokens that a convolution sees: the current one and the two before it."""

Rotary = tuple[Tensor, Tensor] | None
"""cos and sin, ``[B, T, head_dim]``."""


class Multiplicative(nn.Module):
    """y[s,m] = Σ_i x_i·D[s,i]·E[m,i] (+ bias): ``[..., d_in]`` → ``[..., d_out]``, module by module."""

    def __init__(self, inputs: int, outputs: int, modules: int, bias: bool):
        super().__init__()
        self.d = nn.Parameter(torch.empty(modules, inputs))
        self.e = nn.Parameter(torch.empty(outputs // modules, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def matrix(self) -> Tensor:
        """W ``[d_out, d_in]`` with y = x·Wᵀ: W[(s,m), i] = D[s,i]·E[m,i]."""
        return (self.d[:, None] * self.e).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() > len(self.d):
            return functional.linear(x, self.matrix(), self.bias)
        y = functional.linear(x[..., None, :] * self.d, self.e).flatten(-2)
        return y if self.bias is None else y + self.bias


class _Attention(nn.Module):
    """What both kinds share: rotary embedding, cache, attention function."""

    def __init__(self, config: ScalingTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout or 0.0
        self.is_causal = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output ``[B, T, d]`` and the attention's weights, where its implementation gives them, from ``[B, T, d]``."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if rotary is not None:
            q, k = apply_rotary_pos_emb(q, k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attention(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return out.flatten(2), weights


class DenseAttention(_Attention):
    """Four d × d projections."""

    def __init__(self, config: ScalingTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, padding: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x ``[B, T, d]``; ``padding`` is not needed here, since the attention's mask covers it."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out, weights = self.attend(q, k, v, rotary, mask, cache, **kwargs)
        return self.o_proj(out), weights


class SparseAttention(_Attention):
    """One multiplicative layer, then convolutions over (length × modules)."""

    def __init__(self, config: ScalingTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        assert config.qkv_modules is not None
        size, bias = config.hidden_size, config.attention_bias
        self.modules_count = config.qkv_modules
        channels = size // config.qkv_modules
        self.multiplicative = Multiplicative(size, size, config.qkv_modules, bias)
        self.q_conv = nn.Conv2d(channels, channels, (LENGTH, 3), padding=(0, 1), bias=bias)
        self.k_conv = nn.Conv2d(channels, channels, (LENGTH, 3), padding=(0, 1), bias=bias)
        self.v_conv = nn.Conv2d(channels, channels, (LENGTH, 1), bias=bias)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, padding: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x ``[B, T, d]``; ``padding`` ``[B, T]``, 0 where there is no token, or None."""
        y = self.multiplicative(x)
        if padding is not None:
            # A sequence padded on the left then meets the same zeros as one that begins there.
            y = y * padding[..., None].to(y.dtype)
        image = self._with_past(y, cache).unflatten(-1, (self.modules_count, -1)).permute(0, 3, 1, 2)
        q, k, v = (conv(image).permute(0, 2, 3, 1).flatten(2) for conv in (self.q_conv, self.k_conv, self.v_conv))
        return self.attend(q, k, v, rotary, mask, cache, **kwargs)

    def _with_past(self, y: Tensor, cache: Cache | None) -> Tensor:
        """y ``[B, T, d]`` with the two tokens before it (zeros before the first): ``[B, T + 2, d]``."""
        past = LENGTH - 1
        if cache is None:
            return functional.pad(y, (0, 0, past, 0))
        # The cache keeps time last; it answers with past and new, or with the new alone at the start.
        known = cache.update_conv_state(y.transpose(1, 2), self.layer_idx, conv_kernel_size=past).transpose(1, 2)
        wanted = y.shape[1] + past
        return functional.pad(known, (0, 0, max(0, wanted - known.shape[1]), 0))[:, -wanted:]
