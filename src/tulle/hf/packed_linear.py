"""Torch modules that compute exactly what the packed numbers mean.

:class:`PackedLinear` holds the tensors of ``docs/reference/format.md`` as buffers and stands where the linear stood.

- Weights only (``input_bits`` is None): y = x·Wᵀ + b with W = Δ·(u − z), or Δ times the float that u is, dequantised in
  float32, rounded once to the dtype of x, and cached. In a float32 model W is exact.
- Transforms: x·T₁·T₂·… in float32 stands for x, and W is stored as W·T⁻ᵀ.
- Quantised input (``input_bits``): the integer arithmetic of the engine. Per token a step s and whole numbers x_q
  (:mod:`tulle.core.token_grid`); one int32 sum Σ x_q·(u − z) per output and group; then in float32, groups
  in ascending order, y = s·Σ_g Δ_g·sum_g + b, rounded once to the dtype of x.
- Sparse input (``input_sparsity``): the inputs that a token does not keep are zero (:mod:`tulle.core.topk`), chosen
  after transforms and quantisation. Siblings that read one x with one selection make it once each; it is exact.

Packed tensors never change dtype: ``model.to(torch.bfloat16)`` moves the biases only.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import BlockMatrix, Diagonal, Hadamard, Kronecker, Permutation, Transform, run, unfold
from tulle.format.pack import BYTE_SCALES, LEVELS
from tulle.format.spec import LinearSpec, TransformSpec

EXACT_INTEGERS = 1 << 24
"""float32 holds every whole number up to here, so a matmul whose partial sums stay below it is exact."""

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int32": torch.int32,
}


def input_grid(spec: LinearSpec) -> TokenGrid | None:
    """The quantiser that stands in front of a linear."""
    if spec.input_bits is None:
        return None
    return TokenGrid(spec.input_bits, spec.input_symmetric, spec.input_clip)


def input_selection(spec: LinearSpec, score: Tensor | None = None) -> Selection | None:
    """What chooses a linear's inputs; ``score`` is its tensor ``input_score``, for a weighted one."""
    if spec.input_sparsity is None:
        return None
    settings = dataclasses.asdict(spec.input_sparsity)
    weighted = settings.pop("weighted")
    return Selection(**settings, score=score if weighted else None)


class InputTransform(nn.Module):
    """The transforms in front of a linear of ``channels`` inputs, their tensors as buffers ``0.matrix``, …"""

    def __init__(self, specs: Sequence[TransformSpec], channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.specs = tuple(specs)
        for i, spec in enumerate(specs):
            holder = nn.Module()
            for suffix, (kind, shape) in spec.tensors(channels).items():
                holder.register_buffer(suffix, torch.zeros(shape, dtype=DTYPES[kind], device=device))
            self.add_module(str(i), holder)
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., C]`` → x·T₁·T₂·…, float32. The siblings that read one x share one result."""
        if self._last is not None:
            seen, version, result = self._last
            if seen() is x and _version(x) == version:
                return result
        result = run(self.maps(), x.float())
        self._last = None if result.requires_grad else (weakref.ref(x), _version(x), result)
        return result

    def maps(self) -> list[Transform]:
        """The transforms as functions, on the buffers as they are now."""
        return [
            transform_of(spec, dict(self.get_submodule(str(i)).named_buffers())) for i, spec in enumerate(self.specs)
        ]


def _version(x: Tensor) -> int:
    """Changes when x is written to; tensors of inference mode do not count their writes."""
    return -1 if x.is_inference() else x._version


def transform_of(spec: TransformSpec, tensors: Mapping[str, Tensor]) -> Transform:
    """A transform from its tensors by suffix."""
    if spec.kind == "diagonal":
        return Diagonal(tensors["scale"])
    if spec.kind == "permutation":
        return Permutation(tensors["index"].long())
    if spec.kind == "block_matrix":
        return BlockMatrix(tensors["matrix"].float(), orthogonal=False)
    if spec.kind == "kronecker":
        return Kronecker(tensors["left"].float(), tensors["right"].float())
    assert spec.block is not None
    return Hadamard(spec.block)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """uint8 ``[..., ceil(count/8)]``, least significant bit first, to 0/1 uint8 ``[..., count]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :count]


def unpack_integers(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes u, uint8 ``[..., count]``, of nibbles, bytes or bit planes ``[..., bits, ceil(count/8)]``."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]
    planes = unpack_bits(packed, count)
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (planes << shifts[:, None]).sum(-2, dtype=torch.uint8)


def unpack_mask(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """bool ``[C_out, C_in]``, True = kept; None for a dense linear."""
    return unpack_bits(tensors["mask"], spec.shape[1]).bool() if spec.sparse else None


def unpack_codes(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Codes u of a quantised weight, uint8 ``[C_out, C_in]``, 0 where pruned; and the mask."""
    assert spec.bits is not None
    kept = unpack_mask(spec, tensors)
    if kept is None:
        return unpack_integers(tensors["codes"], spec.bits, spec.shape[1]), None
    stream = unpack_integers(tensors["values"], spec.bits, spec.stored)
    return torch.zeros(spec.shape, dtype=torch.uint8, device=kept.device).masked_scatter_(kept, stream), kept


def signed_codes(spec: LinearSpec, codes: Tensor) -> Tensor:
    """int16 of codes ``[…]``: around 0 on a symmetric grid, levels of a format of floats
    (:data:`tulle.format.pack.LEVELS`), else as they are."""
    assert spec.bits is not None
    if spec.format != "int":
        return torch.from_numpy(LEVELS).to(codes.device, torch.int16)[codes.int()]
    return codes.short() - (1 << (spec.bits - 1)) if spec.symmetric else codes.short()


def unpack_zero(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """Zero points of an asymmetric weight, uint8 ``[C_out, G]``."""
    assert spec.bits is not None
    return unpack_integers(tensors["zero_point"], spec.zero_point_bits or spec.bits, spec.groups)


def unpack_integer_weight(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The whole numbers u − z of a quantised weight, int16 ``[C_out, C_in]``; of floats twice the numbers
    (:data:`tulle.format.pack.LEVELS`); zero where pruned."""
    codes, kept = unpack_codes(spec, tensors)
    whole = signed_codes(spec, codes)
    if not spec.symmetric:
        zero = unpack_zero(spec, tensors).short()
        whole = whole - zero.repeat_interleave(spec.shape[1] // zero.shape[1], 1)
    return whole if kept is None else whole * kept


def unpack_scale(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales float32 ``[C_out, G]``, times the row's where they have 8 bits; of floats half of them, since
    :func:`unpack_integer_weight` is twice the numbers."""
    if spec.format != "int":
        table = torch.from_numpy(BYTE_SCALES[spec.format]).to(tensors["scale"].device) * 0.5
        steps = table[tensors["scale"].int()]
        return steps * tensors["tensor_scale"] if spec.format == "nvfp4" else steps
    scale = tensors["scale"].float()
    return scale if spec.scale_bits == 16 else scale * tensors["row_scale"].float()[:, None]


def dequantise(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The float32 weight ``[C_out, C_in]``, equal bit for bit to :func:`tulle.format.pack.unpack_linear`."""
    if spec.bits is not None:
        scale = unpack_scale(spec, tensors)
        return unpack_integer_weight(spec, tensors) * scale.repeat_interleave(spec.shape[1] // scale.shape[1], 1)
    kept = unpack_mask(spec, tensors)
    if kept is not None:
        return torch.zeros(spec.shape, device=kept.device).masked_scatter_(kept, tensors["values"].float())
    return tensors["weight"].float()


def integer_linear(
    x: Tensor, whole: Tensor, scale: Tensor, bits: int, grid: TokenGrid, selection: Selection | None = None
) -> Tensor:
    """float32 ``[T, C_out]`` of x ``[T, C_in]`` with the weight Δ·whole: see the module's docstring.

    ``whole`` ``[C_out, C_in]``: whole numbers below 2^bits in float32; ``scale`` Δ: float32 ``[C_out, G]``.
    """
    codes, step = grid.quantise(x)
    if selection is not None:
        rounded = codes * step
        mask = selection.mask(rounded)
        ratio = selection.ratio(rounded, mask)
        codes, step = codes * mask, step if ratio is None else step * ratio
    width = whole.shape[1] // scale.shape[1]
    chunk = min(width, EXACT_INTEGERS // ((1 << bits) << (grid.bits - 1 if grid.symmetric else grid.bits)))
    y = torch.zeros(x.shape[0], whole.shape[0], device=x.device)
    for group in range(scale.shape[1]):
        total = torch.zeros_like(y, dtype=torch.int32)
        for start in range(group * width, (group + 1) * width, chunk):
            columns = slice(start, min(start + chunk, (group + 1) * width))
            total += (codes[:, columns] @ whole[:, columns].T).int()
        y += total.float() * scale[:, group]
    return y * step


class PackedLinear(nn.Module):
    """A linear whose parameters are the packed tensors of ``spec``, plus ``bias`` ``[C_out]``.

    ``dtype`` is that of the bias. The dequantised weight is made at the first forward pass and kept (as large
    as the dense weight); loading, moving or casting drops it.
    """

    def __init__(
        self,
        spec: LinearSpec,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.grid = input_grid(spec)
        holds = bool(spec.transform) and spec.transform_of is None
        self.transform = InputTransform(spec.transform, spec.shape[1], device) if holds else None
        # A linear of the same group holds the tensors; not a child, or its state would be saved twice.
        self._shared: tuple[InputTransform, ...] = ()
        self.out_features, self.in_features = spec.shape
        for suffix, (kind, shape) in (spec.tensors() | spec.input_tensors()).items():
            self.register_buffer(suffix, torch.zeros(shape, dtype=DTYPES[kind], device=device))
        empty = torch.zeros(self.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self._cached: Tensor | None = None

    def share_transform(self, holder: PackedLinear) -> None:
        """Uses the transform of the linear that ``spec.transform_of`` names."""
        assert holder.transform is not None
        self._shared = (holder.transform,)

    def _holder(self) -> InputTransform | None:
        """What transforms this linear's input: its own, or a sibling's."""
        holder = self.transform if self.transform is not None else next(iter(self._shared), None)
        if holder is None and self.spec.transform:
            raise RuntimeError(f"the transform of {self.spec.transform_of} has not been connected")
        return holder

    def transformed(self, x: Tensor) -> Tensor:
        """x·T in float32, or x where there is no transform."""
        holder = self._holder()
        if holder is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return holder(x)

    @property
    def selection(self) -> Selection | None:
        """What chooses the inputs, with the score as it is now."""
        return input_selection(self.spec, self._buffers.get("input_score"))

    def selected(self, x: Tensor) -> Tensor:
        """What the weights read of x ``[..., C_in]``: transformed, rounded, and zero where it is not kept."""
        x, selection = self.transformed(x), self.selection
        if self.grid is not None:
            x = self.grid.fake(x)
        return x if selection is None else selection.apply(x)

    def effective(self) -> Tensor:
        """The float32 weight ``[C_out, C_in]`` that belongs to the input before its transforms."""
        holder = self._holder()
        return self.dequantise() if holder is None else unfold(holder.maps(), self.dequantise())

    def dequantise(self) -> Tensor:
        """The float32 weight ``[C_out, C_in]``."""
        return dequantise(self.spec, self._buffers)  # type: ignore[arg-type]

    def set_weight(self, weight: Tensor) -> None:
        """Another form of the dequantised weight, for inputs of its dtype, until the next loading or moving."""
        self._cached = weight

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.spec.bits is not None and self.grid is not None:
            return self._integer_forward(self.transformed(x), self.spec.bits, self.grid).to(dtype)
        if self._cached is None or self._cached.dtype != dtype:
            self._cached = self.dequantise().to(dtype)
        return F.linear(self.selected(x).to(dtype), self._cached, self.bias)

    def _integer_forward(self, x: Tensor, bits: int, grid: TokenGrid) -> Tensor:
        if self._cached is None:
            self._cached = unpack_integer_weight(self.spec, self._buffers).float()  # type: ignore[arg-type]
        scale = unpack_scale(self.spec, self._buffers)  # type: ignore[arg-type]
        # Autocast would round the sums to its own dtype.
        with torch.autocast(x.device.type, enabled=False):
            y = integer_linear(x.reshape(-1, self.in_features), self._cached, scale, bits, grid, self.selection)
            if self.bias is not None:
                y = y + self.bias.float()
        return y.reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._cached = None
        packed = {id(buffer) for buffer in self._buffers.values()}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        s = self.spec
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}",
        ]
        parts += [f"bits={s.bits}", f"group_size={s.group_size}"] if s.bits is not None else []
        parts += [f"format={s.format}"] if s.format != "int" else []
        parts += ["sparse"] if s.sparse else []
        parts += [f"input_bits={s.input_bits}"] if s.input_bits is not None else []
        parts += [f"input_sparsity={s.input_sparsity.kind}"] if s.input_sparsity is not None else []
        parts += [f"transform_of={s.transform_of}"] if s.transform_of is not None else []
        return ", ".join(parts)
