"""The compiled search for codes (native/include/tulle/search.hpp) on tensors.

Clip search, the column sweep and coordinate descent stand in ``grid``, ``sweep`` and ``descent`` as plain torch, which
defines them and runs on any device. What is here computes the same for float32 tensors on the CPU, equal up to
rounding: where two choices are equally good to seven digits, the other may win. Results do not depend on the number of
threads or on the instruction set.

Products of whole matrices stay torch's; the kernels do what happens between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tulle import _native
from tulle.core.hessian import Factor

if TYPE_CHECKING:
    from tulle.core.grid import Grid, Quantised

BLOCK = 64
"""Columns of the sweep between two products, where nothing else sets them."""
PRODUCTS = 1 << 21
"""Elements of the descent's products that are in memory at once: 8 MiB stay in the last cache."""


def fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: on the CPU, float32 where they are not masks."""
    return all(t is None or (t.device.type == "cpu" and t.dtype in (torch.float32, torch.bool)) for t in tensors)


def find_steps(
    weight: Tensor,
    grid: Grid,
    importance: Tensor,
    ratios: Tensor,
    mask: Tensor | None,
    ranges: tuple[Tensor, Tensor] | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """``grid.find_steps`` for W ``[C_out, C_in]``, importance ``[C_in]`` and clip ratios ``[N]``, the first 1."""
    step, zero = (torch.empty(weight.shape[0], groups) for _ in range(2))
    low, high = (None, None) if ranges is None else (_array(t) for t in ranges)
    _native.find_steps(
        _array(weight), _array(importance), _optional(mask), grid.low, grid.high, grid.symmetric, _array(ratios),
        low, high, step.numpy(), zero.numpy(), torch.get_num_threads(),
    )  # fmt: skip
    return step, zero


def sweep(
    weight: Tensor,
    factor: Factor,
    quantised: Quantised | None = None,
    mask: Tensor | None = None,
    choose: Callable[[int, Tensor], Tensor] | None = None,
    pattern: tuple[int, int] | None = None,
    score: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor | None]:
    """Ŵ and its mask, ``[C_out, C_in]``, for W ``[C_out, C_in]``; the columns are visited in the order of ``factor``.

    With ``quantised`` kept weights are rounded to its steps and its codes are filled in. What is kept:

    - ``mask`` (None: everything), or
    - with ``pattern`` (N, M), of every M columns of the sweep the N with the largest (w_j·score_j)² among those of
      ``mask``, or
    - what ``choose(start, W)`` says at the beginning of each block. It gets the block's first column and its weights as
      updated so far, ``[columns, C_out]`` in the order of the sweep, and gives a mask of that shape.

    With H + λI = V·Vᵀ, V upper triangular, the sweep's U is V⁻¹ and column j is compressed from
    w_j + Σ_{i<j} (w_i − ŵ_i)·V_ij/V_jj (GPTQ as Babai's nearest plane: Chen et al. 2025, "The Geometry of LLM
    Quantization"). That needs no inverse, and what the done columns owe a block is one product.
    """
    rows, columns = weight.shape
    threads = torch.get_num_threads()
    order, feedback = factor.order.numpy(), factor.feedback
    source, error = torch.empty(columns, rows), torch.empty(columns, rows)
    _native.take_columns(_array(weight), order, source.numpy(), threads)
    kept = None
    if mask is not None or pattern is not None or choose is not None:
        kept = torch.ones(columns, rows, dtype=torch.bool)
        if mask is not None and choose is None:
            _native.take_columns(_array(mask), order, kept.numpy(), threads)
    group = step = zero = codes = None
    low = high = 0
    if quantised is not None:
        group = (factor.order // (columns // quantised.scale.shape[1])).numpy()
        step, zero = (t.T.contiguous().numpy() for t in (quantised.scale, quantised.zero))
        codes = torch.empty(columns, rows, dtype=torch.int16)
        low, high = quantised.grid.low, quantised.grid.high
    n, m = pattern or (0, 0)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        value = torch.addmm(source[start:end], feedback[start:end, :start], error[:start])
        if choose is not None:
            assert kept is not None
            kept[start:end] = choose(start, value)
        _native.sweep_block(
            start, feedback.numpy(), source.numpy(), value.numpy(), error.numpy(), group, step, zero, low, high,
            None if codes is None else codes.numpy(), None if kept is None else kept.numpy(), n, m,
            None if score is None else _array(score), threads,
        )  # fmt: skip
    if quantised is not None:
        assert codes is not None
        _native.put_columns(codes.numpy(), order, quantised.codes.numpy(), threads)
    compressed = torch.empty(rows, columns)
    _native.put_columns(source.sub_(error).numpy(), order, compressed.numpy(), threads)
    if kept is not None:
        mask = torch.empty(rows, columns, dtype=torch.bool)
        _native.put_columns(kept.numpy(), order, mask.numpy(), threads)
    return compressed, mask


def descend(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    hessian: Tensor,
    mask: Tensor | None,
    sweeps: int,
    steps_first: bool,
) -> None:
    """``descent.descend`` on codes int16 ``[C_out, C_in]`` and steps ``[C_out, G]``, both changed in place.

    ``steps_first``: every step of a sweep moves before its codes. Costs two products of W's shape with H; the sweeps
    themselves are cheap.
    """
    columns, groups = weight.shape[1], scale.shape[1]
    threads = torch.get_num_threads()
    hessian, w, keep = hessian.contiguous(), weight.contiguous(), None if mask is None else mask.contiguous()
    by_group = hessian.view(groups, -1, columns)
    for rows in torch.arange(weight.shape[0]).split(max(1, PRODUCTS // (groups * columns))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        q, s, z = codes[part].numpy(), scale[part].numpy(), zero[part].numpy()
        masked = None if keep is None else keep[part].numpy()
        level, residual = torch.empty(len(rows), columns), torch.empty(len(rows), columns)
        _native.open_levels(q, s, z, masked, w[part].numpy(), level.numpy(), residual.numpy(), threads)
        gradient = residual @ hessian
        product = torch.bmm(level.view(len(rows), groups, -1).transpose(0, 1), by_group)
        _native.descend(
            hessian.numpy(), gradient.numpy(), product.numpy(), q, s, z, masked, grid.low, grid.high, sweeps,
            steps_first, threads,
        )  # fmt: skip


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().contiguous().numpy()


def _optional(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else _array(tensor)
