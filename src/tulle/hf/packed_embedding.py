"""Embeddings whose table is stored in codes, and heads that are tied to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulle.format.spec import LinearSpec
from tulle.hf.packed_linear import DTYPES, dequantise


class PackedEmbedding(nn.Module):
    """An embedding ``[V, d]`` whose buffers are the packed tensors of ``spec``; rows come out in ``dtype``, multiplied
    by ``multiplier``.

    ``forward`` unpacks the rows that are asked for. :meth:`table` keeps what it unpacked until the next loading or
    moving.
    """

    def __init__(
        self,
        spec: LinearSpec,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.spec, self.padding_idx, self.multiplier = spec, padding_idx, multiplier
        self.num_embeddings, self.embedding_dim = spec.shape
        for suffix, (kind, shape) in spec.tensors().items():
            self.register_buffer(suffix, torch.zeros(shape, dtype=DTYPES[kind], device=device))
        self._dtype = dtype or torch.get_default_dtype()
        self._cached: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows ``[..., d]`` of tokens ``[...]``."""
        unique, places = tokens.reshape(-1).unique(return_inverse=True)
        rows = {
            suffix: buffer if suffix == "tensor_scale" else buffer[unique]
            for suffix, buffer in self._buffers.items()
            if buffer is not None
        }
        spec = replace(self.spec, shape=(len(unique), self.embedding_dim))
        found = dequantise(spec, rows)[places].to(self._dtype).reshape(*tokens.shape, self.embedding_dim)
        # As transformers does: the multiplier, too, in the rows' dtype.
        return (
            found
            if self.multiplier == 1
            else found * torch.tensor(self.multiplier, dtype=found.dtype, device=found.device)
        )

    def dequantise(self) -> Tensor:
        """The float32 table ``[V, d]``."""
        return dequantise(self.spec, self._buffers)  # type: ignore[arg-type]

    def table(self, dtype: torch.dtype) -> Tensor:
        """The table in ``dtype``, kept."""
        if self._cached is None or self._cached.dtype != dtype:
            self._cached = self.dequantise().to(dtype)
        return self._cached

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        self._cached = None
        # What a cast would make of activations, it makes of the rows.
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.get_buffer("codes").device)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.shape[0]}, {s.shape[1]}, bits={s.bits}, group_size={s.group_size}"


class TiedHead(nn.Module):
    """y = x·Eᵀ with the table of a :class:`PackedEmbedding`, which holds the tensors."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # Not a child, or its state would be saved twice.
        self._embedding = (embedding,)
        self.out_features, self.in_features = embedding.spec.shape

    @property
    def embedding(self) -> PackedEmbedding:
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.table(x.dtype))
