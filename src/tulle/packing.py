"""From a linear's state to the tensors that stand for it in the file (``docs/format.md``)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tulle.core.contract import LinearState
from tulle.format.pack import f32_to_bf16, pack_linear
from tulle.format.spec import LinearSpec


def spec_of(linear: LinearState, dtype: torch.dtype) -> LinearSpec:
    """How a linear's state is stored: as a bitmask with values, or dense where that is no larger."""
    dense = LinearSpec(
        shape=(linear.weight.shape[0], linear.weight.shape[1]),
        bits=linear.quantised.grid.bits if linear.quantised else None,
        group_size=linear.quantised.grid.group_size if linear.quantised else None,
        symmetric=linear.quantised.grid.symmetric if linear.quantised else True,
        input_bits=linear.input_bits,
        values_dtype=None if linear.quantised else str(dtype).removeprefix("torch."),
    )
    if linear.mask is None:
        return dense
    sparse = dataclasses.replace(dense, sparse=True, nonzeros=int(linear.mask.sum()), pattern=linear.pattern)
    return sparse if sparse.packed_bytes < dense.packed_bytes else dense


def packed_tensors(linear: LinearState, spec: LinearSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of ``docs/format.md`` for one linear, by suffix."""
    mask = linear.mask.cpu().numpy() if spec.sparse and linear.mask is not None else None
    q = linear.quantised
    if q is None:
        weight = linear.weight.to(dtype).cpu()
        if mask is None:
            return {"weight": weight}
        values = weight.view(torch.uint16).numpy() if dtype == torch.bfloat16 else weight.numpy()
        return _tensors(pack_linear(spec, values, mask), spec)
    codes = q.codes
    if linear.mask is not None and not spec.sparse:
        # A pruned weight stored densely is the code that means zero.
        width = codes.shape[1] // q.zero.shape[1]
        codes = torch.where(linear.mask, codes, q.zero.repeat_interleave(width, 1).to(codes.dtype))
    unsigned = (codes.int() - q.grid.low).to(torch.uint8).cpu().numpy()
    zero = None if q.grid.symmetric else q.zero.to(torch.uint8).cpu().numpy()
    return _tensors(pack_linear(spec, unsigned, mask, f32_to_bf16(q.scale.cpu().numpy()), zero), spec)


def _tensors(arrays: dict[str, Any], spec: LinearSpec) -> dict[str, Tensor]:
    kinds = spec.tensors()
    tensors = {suffix: torch.from_numpy(array) for suffix, array in arrays.items()}
    return {suffix: t.view(torch.bfloat16) if kinds[suffix][0] == "bfloat16" else t for suffix, t in tensors.items()}
