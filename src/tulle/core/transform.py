"""Invertible linear maps T in front of a linear: y = x·Wᵀ = (x·T)·(W·T⁻ᵀ)ᵀ.

``apply`` is what runs on the activations x ``[..., C]``, ``fold`` what happens once to the weight W ``[C_out, C]``
(for orthogonal T the two are one formula), ``unfold`` is fold's inverse, W′·Tᵀ. A chain of maps is a tuple, applied
from left to right.

Files hold matrices in float16. ``stored`` is the map with the values that a file gives back: no longer quite
orthogonal, so its ``fold`` takes the true inverse, and the product stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tulle.core.hadamard import hadamard_transform


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x·diag(d), d ``[C]``."""

    scale: Tensor
    kind = "diagonal"

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def fold(self, w: Tensor) -> Tensor:
        return w / self.scale

    def unfold(self, w: Tensor) -> Tensor:
        return w * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}


@dataclass(frozen=True, eq=False)
class Permutation:
    """x[..., index], index int64 ``[C]``."""

    index: Tensor
    kind = "permutation"

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index)

    def fold(self, w: Tensor) -> Tensor:
        return w.index_select(-1, self.index)

    def unfold(self, w: Tensor) -> Tensor:
        return w[..., self.index.argsort()]

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index.to(torch.int32)}


@dataclass(frozen=True, eq=False)
class Hadamard:
    """x·H/√b in consecutive blocks of b channels (:mod:`tulle.core.hadamard`)."""

    block: int
    kind = "hadamard"

    def apply(self, x: Tensor) -> Tensor:
        return hadamard_transform(x, self.block)

    def fold(self, w: Tensor) -> Tensor:
        return hadamard_transform(w, self.block)

    def unfold(self, w: Tensor) -> Tensor:
        return hadamard_transform(w, self.block, transpose=True)

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class BlockMatrix:
    """x·diag(M, …, M) for one shared M ``[b, b]``, or x·diag(M₁, M₂, …) for ``[C/b, b, b]``."""

    matrix: Tensor
    orthogonal: bool = True
    """Whether ``fold`` may take M for M⁻ᵀ."""
    kind = "block_matrix"

    @property
    def block(self) -> int:
        return self.matrix.shape[-1]

    @property
    def shared(self) -> bool:
        return self.matrix.dim() == 2

    def apply(self, x: Tensor) -> Tensor:
        return _blocks(x, self.matrix.to(x.dtype))

    def fold(self, w: Tensor) -> Tensor:
        return self.apply(w) if self.orthogonal else _blocks(w, _inverse_transpose(self.matrix).to(w.dtype))

    def unfold(self, w: Tensor) -> Tensor:
        return _blocks(w, self.matrix.mT.to(w.dtype))

    def stored(self) -> BlockMatrix:
        return BlockMatrix(self.matrix.half().float(), orthogonal=False)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix.half()}


@dataclass(frozen=True, eq=False)
class Kronecker:
    """x·(L ⊗ R): x as ``[a, b]`` becomes Lᵀ·x·R, for L ``[a, a]``, R ``[b, b]``, C = a·b."""

    left: Tensor
    right: Tensor
    kind = "kronecker"

    def apply(self, x: Tensor) -> Tensor:
        return _kronecker(x, self.left.to(x.dtype), self.right.to(x.dtype))

    def fold(self, w: Tensor) -> Tensor:
        left, right = (_inverse_transpose(m).to(w.dtype) for m in (self.left, self.right))
        return _kronecker(w, left, right)

    def unfold(self, w: Tensor) -> Tensor:
        return _kronecker(w, self.left.T.to(w.dtype), self.right.T.to(w.dtype))

    def stored(self) -> Kronecker:
        return Kronecker(self.left.half().float(), self.right.half().float())

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left.half(), "right": self.right.half()}


Transform = Diagonal | Permutation | Hadamard | BlockMatrix | Kronecker


def stored(transform: Transform) -> Transform:
    """The map as a file gives it back."""
    return transform.stored() if isinstance(transform, BlockMatrix | Kronecker) else transform


def run(maps: Iterable[Transform], x: Tensor) -> Tensor:
    """x·T₁·T₂·…: :func:`run_plain`, faster where rotations enclose a permutation (DuQuant) and tokens are many."""
    maps = tuple(maps)
    match maps:
        case (BlockMatrix() as first, Permutation() as between, BlockMatrix() as last) if (
            x.device.type == "cpu" and x.numel() >= _TOKENS * x.shape[-1] and not _differentiated(maps, x)
        ):
            tokens = x.reshape(-1, x.shape[-1])
            out = torch.empty_like(tokens)
            for part, into in zip(tokens.split(_TOKENS), out.split(_TOKENS), strict=True):
                _rotate_permute_rotate(part, first, between, last, into)
            return out.view(x.shape)
    return run_plain(maps, x)


def run_plain(maps: Iterable[Transform], x: Tensor) -> Tensor:
    """x·T₁·T₂·…, one map after the other."""
    for t in maps:
        x = t.apply(x)
    return x


_TOKENS = 64
"""Tokens that go through a chain together: what lies between the maps stays in cache."""


def _rotate_permute_rotate(x: Tensor, first: BlockMatrix, between: Permutation, last: BlockMatrix, out: Tensor) -> None:
    """x ``[T, C]`` to ``out``. Between the rotations channels lie in rows: the gather moves rows, not single values."""
    tokens, width = x.shape
    channels = first.matrix.to(x.dtype).mT @ x.view(tokens, -1, first.block).permute(1, 2, 0)
    channels = channels.view(width, tokens).index_select(0, between.index)
    rotated = channels.view(-1, last.block, tokens).mT @ last.matrix.to(x.dtype)
    out.view(tokens, -1, last.block).copy_(rotated.transpose(0, 1))


def _differentiated(maps: Sequence[Transform], x: Tensor) -> bool:
    tensors = [x, *(tensor for t in maps for tensor in vars(t).values() if isinstance(tensor, Tensor))]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def fold(maps: Iterable[Transform], w: Tensor) -> Tensor:
    """W·T₁⁻ᵀ·T₂⁻ᵀ·…"""
    for t in maps:
        w = t.fold(w)
    return w


def unfold(maps: Sequence[Transform], w: Tensor) -> Tensor:
    """W from what :func:`fold` made of it: W′·…·T₂ᵀ·T₁ᵀ."""
    for t in reversed(maps):
        w = t.unfold(w)
    return w


def _blocks(x: Tensor, matrix: Tensor) -> Tensor:
    b = matrix.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, b)
    if matrix.dim() == 2:
        return (parts @ matrix).reshape(x.shape)
    return torch.einsum("...kb,kbc->...kc", parts, matrix).reshape(x.shape)


def _kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    parts = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
    return (left.T @ (parts @ right)).reshape(x.shape)


def _inverse_transpose(matrix: Tensor) -> Tensor:
    """In float64, so that a fold loses nothing to an inverse in float32."""
    return torch.linalg.inv(matrix.double()).mT
