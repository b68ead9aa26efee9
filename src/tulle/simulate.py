"""Torch modules that compute exactly what the packed numbers mean.

:class:`PackedLinear` holds the tensors of ``docs/format.md`` as buffers and stands where the linear stood.

- Weights only (``input_bits`` is None): y = x·Wᵀ + b with W = Δ·(u − z), dequantised in float32, rounded
  once to the dtype of x, and cached. In a float32 model W is exact.
- Quantised input (``input_bits`` 8): the integer arithmetic of the engine. Per token s = max|x|/127 and
  x_q = round(x/s) (half to even); one int32 sum Σ x_q·(u − z) per output and group; then in float32, groups
  in ascending order, y = s·Σ_g Δ_g·sum_g + b, rounded once to the dtype of x.

Packed tensors never change dtype: ``model.to(torch.bfloat16)`` moves the biases only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulle.format.spec import LinearSpec

EXACT_INTEGERS = 1 << 24
"""float32 holds every whole number up to here, so a matmul whose partial sums stay below it is exact."""

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}


def quantise_input(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers in float32, ``[..., C]``) and steps s (float32 ``[..., 1]``) of x ``[..., C]``.

    Per token, symmetric: s = max|x|/(2^(b−1)−1), 1 for a token of zeros; codes are at most 2^(b−1)−1 in size.
    """
    high = (1 << (bits - 1)) - 1
    x = x.float()
    step = x.abs().amax(-1, keepdim=True) / high
    step = torch.where(step == 0, torch.ones_like(step), step)
    return (x / step).round().clamp(-high, high), step


def fake_quantise_input(x: Tensor, bits: int = 8) -> Tensor:
    """s·x_q of :func:`quantise_input`, in the shape and dtype of x."""
    codes, step = quantise_input(x, bits)
    return (codes * step).to(x.dtype)


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


def unpack_integer_weight(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The whole numbers u − z of a quantised weight, int16 ``[C_out, C_in]``; zero where pruned."""
    assert spec.bits is not None
    if spec.sparse:
        kept = unpack_bits(tensors["mask"], spec.shape[1]).bool()
        stream = unpack_integers(tensors["values"], spec.bits, spec.stored)
        codes = torch.zeros(spec.shape, dtype=torch.uint8, device=kept.device).masked_scatter_(kept, stream)
    else:
        kept = None
        codes = unpack_integers(tensors["codes"], spec.bits, spec.shape[1])
    if spec.symmetric:
        whole = codes.short() - (1 << (spec.bits - 1))
    else:
        zero = tensors["zero_point"].short()
        whole = codes.short() - zero.repeat_interleave(spec.shape[1] // zero.shape[1], 1)
    return whole if kept is None else whole * kept


def dequantise(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The float32 weight ``[C_out, C_in]``, equal bit for bit to :func:`tulle.format.pack.unpack_linear`."""
    if spec.bits is not None:
        scale = tensors["scale"].float()
        return unpack_integer_weight(spec, tensors) * scale.repeat_interleave(spec.shape[1] // scale.shape[1], 1)
    if spec.sparse:
        kept = unpack_bits(tensors["mask"], spec.shape[1]).bool()
        return torch.zeros(spec.shape, device=kept.device).masked_scatter_(kept, tensors["values"].float())
    return tensors["weight"].float()


def integer_linear(x: Tensor, whole: Tensor, scale: Tensor, bits: int, input_bits: int) -> Tensor:
    """float32 ``[T, C_out]`` of x ``[T, C_in]`` with the weight Δ·whole: see the module's docstring.

    ``whole`` ``[C_out, C_in]``: whole numbers below 2^bits in float32; ``scale`` Δ: float32 ``[C_out, G]``.
    """
    codes, step = quantise_input(x, input_bits)
    width = whole.shape[1] // scale.shape[1]
    chunk = min(width, EXACT_INTEGERS // ((1 << bits) << (input_bits - 1)))
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
        self.out_features, self.in_features = spec.shape
        for suffix, (kind, shape) in spec.tensors().items():
            self.register_buffer(suffix, torch.zeros(shape, dtype=DTYPES[kind], device=device))
        empty = torch.zeros(self.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self._cached: Tensor | None = None

    def dequantise(self) -> Tensor:
        """The float32 weight ``[C_out, C_in]``."""
        return dequantise(self.spec, self._buffers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.bits is not None and spec.input_bits is not None:
            return self._integer_forward(x, spec.bits, spec.input_bits)
        if self._cached is None or self._cached.dtype != x.dtype:
            self._cached = self.dequantise().to(x.dtype)
        if spec.input_bits is not None:
            x = fake_quantise_input(x, spec.input_bits)
        return F.linear(x, self._cached, self.bias)

    def _integer_forward(self, x: Tensor, bits: int, input_bits: int) -> Tensor:
        if self._cached is None:
            self._cached = unpack_integer_weight(self.spec, self._buffers).float()  # type: ignore[arg-type]
        scale = self.get_buffer("scale").float()
        # Autocast would round the sums to its own dtype.
        with torch.autocast(x.device.type, enabled=False):
            y = integer_linear(x.reshape(-1, self.in_features), self._cached, scale, bits, input_bits)
            if self.bias is not None:
                y = y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

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
        parts += ["sparse"] if s.sparse else []
        parts += [f"input_bits={s.input_bits}"] if s.input_bits is not None else []
        return ", ".join(parts)
