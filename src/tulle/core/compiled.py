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
WIDEST = 256
"""Widest M of a pattern N:M that the sweep's kernel takes."""
PRODUCTS = 1 << 21
"""Elements of the descent's products that are in memory at once: 8 MiB stay in the last cache."""


def fits(*tensors: Tensor | None, grid: Grid | None = None) -> bool:
    """Whether the kernels take these tensors: on the CPU, float32 where they are not masks; and the ``grid``: of whole
    numbers."""
    if grid is not None and grid.format != "int":
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype in (torch.float32, torch.bool)) for t in tensors)


def find_steps(
    weight: Tensor,
    grid: Grid,
    importance: Tensor,
    ratios: Tensor,
    mask: Tensor | None,
    ranges: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """``grid.find_steps`` for W ``[C_out, C_in]``, importance ``[C_in]`` and clip ratios ``[N]``, the first 1."""
    groups = weight.shape[1] // (grid.group_size or weight.shape[1])
    step, zero = (torch.empty(weight.shape[0], groups) for _ in range(2))
    low, high = (None, None) if ranges is None else (_array(t) for t in ranges)
    _native.find_steps(
        _array(weight), _array(importance), _optional(mask), grid.low, grid.high, grid.symmetric, _array(ratios),
        low, high, step.numpy(), zero.numpy(), torch.get_num_threads(),
    )  # fmt: skip
    return step, zero


def sweep_codes(weight: Tensor, factor: Factor, quantised: Quantised, mask: Tensor | None, block: int = BLOCK) -> None:
    """Rounds W ``[C_out, C_in]`` to the steps of ``quantised``, zero outside ``mask``, and fills in its codes.

    Columns are visited in the order of ``factor``. With H + λI = V·Vᵀ, V upper triangular, the sweep's U is V⁻¹ and
    column j is rounded from w_j + Σ_{i<j} (w_i − ŵ_i)·V_ij/V_jj (GPTQ as Babai's nearest plane: Chen et al. 2025, "The
    Geometry of LLM Quantization"). That needs no inverse, and what the done columns owe a block is one product.
    """
    kept = None if mask is None else _take(mask, factor.order)
    _sweep(weight, factor.feedback, factor.order, quantised, kept, None, (0, 0), None, block, by_weight=True)


def sweep_mask(
    weight: Tensor,
    factor: Factor,
    quantised: Quantised | None,
    allowed: Tensor | None,
    choose: Callable[[int, Tensor], Tensor] | None,
    pattern: tuple[int, int] | None,
    block: int,
    score: Tensor,
) -> tuple[Tensor, Tensor]:
    """Ŵ and its mask, ``[C_out, C_in]``, for W ``[C_out, C_in]``, visited in the order of ``factor``.

    The mask is what ``choose(start, W)`` says at the beginning of each block: it gets the block's first column and its
    weights as updated so far, ``[columns, C_out]`` in the order of the sweep, and gives a mask of that shape. Or, with
    ``pattern`` (N, M), of every M columns of the sweep the N with the largest (w_j·score_j)² among the ``allowed`` ones
    stay. With neither, it is ``allowed``. With ``quantised`` kept weights are rounded to its steps and its codes are
    filled in.
    """
    kept = torch.ones(weight.shape[::-1], dtype=torch.bool) if allowed is None else _take(allowed, factor.order)
    upper = factor.upper
    feedback = (upper * -factor.pivot[:, None]).T.contiguous()
    compressed = _sweep(
        weight, feedback, factor.order, quantised, kept, choose, pattern or (0, 0), score, block, by_weight=False
    )
    return _put(compressed, factor.order), _put(kept, factor.order)


def _sweep(
    weight: Tensor,
    feedback: Tensor,
    order: Tensor,
    quantised: Quantised | None,
    kept: Tensor | None,
    choose: Callable[[int, Tensor], Tensor] | None,
    pattern: tuple[int, int],
    score: Tensor | None,
    block: int,
    by_weight: bool,
) -> Tensor:
    """Ŵ ``[C_in, C_out]`` in the order of the sweep; ``kept`` likewise, changed in place."""
    threads = torch.get_num_threads()
    source = _take(weight, order)
    columns, rows = source.shape
    error = torch.empty(columns, rows)
    group = step = zero = codes = None
    low = high = 0
    if quantised is not None:
        group = (order // (columns // quantised.scale.shape[1])).numpy()
        step, zero = (t.T.contiguous().numpy() for t in (quantised.scale, quantised.zero))
        codes = torch.empty(columns, rows, dtype=torch.int16)
        low, high = quantised.grid.low, quantised.grid.high
    weighting = None if score is None else _array(score)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        value = torch.addmm(source[start:end], feedback[start:end, :start], error[:start])
        if choose is not None:
            assert kept is not None
            kept[start:end] = choose(start, value)
        _native.sweep_block(
            start, feedback.numpy(), source.numpy() if by_weight else None, value.numpy(), error.numpy(), group, step,
            zero, low, high, None if codes is None else codes.numpy(), None if kept is None else kept.numpy(), *pattern,
            weighting, threads,
        )  # fmt: skip
        if not by_weight:
            source[start:end] = value
    if quantised is not None and codes is not None:
        _native.put_columns(codes.numpy(), order.numpy(), quantised.codes.numpy(), threads)
    return source.sub_(error)


def _take(tensor: Tensor, order: Tensor) -> Tensor:
    """``[C_in, C_out]`` of ``[C_out, C_in]``, columns in the given order."""
    taken = torch.empty(tensor.shape[::-1], dtype=tensor.dtype)
    _native.take_columns(_array(tensor), order.numpy(), taken.numpy(), torch.get_num_threads())
    return taken


def _put(taken: Tensor, order: Tensor) -> Tensor:
    """Inverse of ``_take``."""
    tensor = torch.empty(taken.shape[::-1], dtype=taken.dtype)
    _native.put_columns(taken.numpy(), order.numpy(), tensor.numpy(), torch.get_num_threads())
    return tensor


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
    row_scale: Tensor | None = None,
) -> None:
    """``descent.descend`` on codes int16 ``[C_out, C_in]`` and steps ``[C_out, G]``, both changed in place.

    ``steps_first``: every step of a sweep moves before its codes. ``row_scale`` ``[C_out]``: of steps of 8 bits. Costs
    two products of W's shape with H; the sweeps themselves are cheap.
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
            steps_first, threads, None if row_scale is None else _array(row_scale[part]),
        )  # fmt: skip


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().contiguous().numpy()


def _optional(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else _array(tensor)
