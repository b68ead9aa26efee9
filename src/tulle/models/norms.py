"""Norms of the plain decoder, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tulle.models.description import Norm


class NormModule(nn.Module):
    """A norm of the description with its gain and bias ``[width]``."""

    def __init__(self, norm: Norm, width: int):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.norm, self.weight, self.bias)


def normed(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x/√(mean x² + ε)·(offset + w), or with the mean taken off x before, + b; computed in float32 (Zhang & Sennrich
    2019, Ba et al. 2016). Without an offset RMSNorm's product is in x's dtype, as Llama has it."""
    if norm.kind == "rms" and not norm.offset:
        return rms_norm(x, weight, norm.eps)
    wide = x.float()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * (norm.offset + weight.float())
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * unit_rms(x, eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x/√(mean x² + ε)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
