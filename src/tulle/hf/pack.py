"""From a linear's state to the tensors that stand for it in the file (``docs/reference/format.md``)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tulle.core.grid import Quantised
from tulle.core.head_grids import HeadGrids
from tulle.core.topk import Selection
from tulle.core.transform import BlockMatrix, Hadamard, Kronecker, Transform
from tulle.format.pack import LEVELS, f32_to_bf16, pack_linear
from tulle.format.spec import AttentionSpec, HeadSpec, InputSparsitySpec, LinearSpec, TransformSpec
from tulle.methods.contract import LinearState


def transform_spec(transform: Transform) -> TransformSpec:
    """How the file describes a transform."""
    match transform:
        case Hadamard():
            return TransformSpec(transform.kind, block=transform.block)
        case BlockMatrix():
            return TransformSpec(transform.kind, block=transform.block, shared=transform.shared)
        case Kronecker():
            return TransformSpec(transform.kind, left=len(transform.left), right=len(transform.right))
    return TransformSpec(transform.kind)


def transform_tensors(linear: LinearState) -> dict[str, Tensor]:
    """The tensors of a linear's transforms, by suffix."""
    return {
        f"transform.{i}.{suffix}": tensor.cpu().contiguous()
        for i, transform in enumerate(linear.transform)
        for suffix, tensor in transform.tensors().items()
    }


def input_sparsity_spec(selection: Selection | None) -> InputSparsitySpec | None:
    """How the file describes a selection of inputs."""
    if selection is None:
        return None
    s = selection
    return InputSparsitySpec(
        s.kind, s.keep, s.block, s.unit, s.by, s.score is not None, s.rescale,
        None if s.threshold is None else float(s.threshold),
    )  # fmt: skip


def input_tensors(linear: LinearState) -> dict[str, Tensor]:
    """The tensors that a linear's selection of inputs needs, by suffix."""
    if linear.input_selection is None or linear.input_selection.score is None:
        return {}
    # A copy: siblings share the tensor, files do not.
    return {"input_score": linear.input_selection.score.float().cpu().clone()}


def attention_spec(grids: HeadGrids | None) -> AttentionSpec | None:
    """How the file describes the quantisers of queries, keys and values."""
    if grids is None:
        return None
    query, key, value = (
        None if grid is None else HeadSpec(grid.bits, grid.symmetric, float(grid.clip))
        for grid in (grids.query, grids.key, grids.value)
    )
    return AttentionSpec(query, key, value, grids.hadamard)


def spec_of(linear: LinearState, dtype: torch.dtype, holder: str | None = None) -> LinearSpec:
    """How a linear's state is stored: as a bitmask with values, or dense where that is no larger.

    ``holder`` is the linear that stores the transforms they share, if that is another one.
    """
    dense = LinearSpec(
        shape=(linear.weight.shape[0], linear.weight.shape[1]),
        bits=linear.quantised.grid.bits if linear.quantised else None,
        group_size=linear.quantised.grid.group_size if linear.quantised else None,
        symmetric=linear.quantised.grid.symmetric if linear.quantised else True,
        scale_bits=linear.quantised.grid.scale_bits if linear.quantised else 16,
        format=linear.quantised.grid.format if linear.quantised else "int",
        input_bits=linear.input_bits,
        input_symmetric=linear.input_grid.symmetric if linear.input_grid else True,
        input_clip=float(linear.input_grid.clip) if linear.input_grid else 1.0,
        input_sparsity=input_sparsity_spec(linear.input_selection),
        transform=tuple(transform_spec(t) for t in linear.transform),
        transform_of=holder if linear.transform else None,
        values_dtype=None if linear.quantised else str(dtype).removeprefix("torch."),
    )
    if linear.mask is None:
        return dense
    sparse = dataclasses.replace(dense, sparse=True, nonzeros=int(linear.mask.sum()), pattern=linear.pattern)
    return sparse if sparse.packed_bytes < dense.packed_bytes else dense


def packed_tensors(linear: LinearState, spec: LinearSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of ``docs/reference/format.md`` for one linear, by suffix."""
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
    if q.grid.format != "int":
        return _tensors(_float_arrays(spec, q, codes, mask), spec)
    unsigned = (codes.int() - q.grid.low).to(torch.uint8).cpu().numpy()
    zero = None if q.grid.symmetric else q.zero.to(torch.uint8).cpu().numpy()
    scale, row_scale = f32_to_bf16(q.scale.cpu().numpy()), None
    if q.row_scale is not None:
        scale = (q.scale / q.row_scale[:, None]).round().to(torch.uint8).cpu().numpy()
        row_scale = f32_to_bf16(q.row_scale.cpu().numpy())
    return _tensors(pack_linear(spec, unsigned, mask, scale, zero, row_scale), spec)


def _float_arrays(spec: LinearSpec, q: Quantised, codes: Tensor, mask: Any) -> dict[str, Any]:
    """Of a float format: E2M1 codes, a byte per scale, and nvfp4's scale of the tensor."""
    of_level = np.full(25, 255, np.uint8)  # level + 12 → code; a number that is no level would be refused as a code
    of_level[LEVELS[15:8:-1].astype(np.int16) + 12] = np.arange(15, 8, -1)
    of_level[LEVELS[:8].astype(np.int16) + 12] = np.arange(8)
    values = of_level[codes.cpu().numpy() + 12]
    steps = q.scale.cpu()
    if q.row_scale is None:  # mxfp4: a step is half a scale, 2^(byte − 127)
        return pack_linear(spec, values, mask, (torch.frexp(steps)[1] + 127).to(torch.uint8).numpy())
    whole = q.row_scale[0].cpu()
    scale = (steps / whole).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return pack_linear(spec, values, mask, scale, tensor_scale=(2 * whole.reshape(1)).numpy())


def _tensors(arrays: dict[str, Any], spec: LinearSpec) -> dict[str, Tensor]:
    kinds = spec.tensors()
    tensors = {suffix: torch.from_numpy(array) for suffix, array in arrays.items()}
    return {suffix: t.view(torch.bfloat16) if kinds[suffix][0] == "bfloat16" else t for suffix, t in tensors.items()}
