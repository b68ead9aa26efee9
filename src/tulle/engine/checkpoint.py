"""A checkpoint, packed or dense, read tensor by tensor and linear by linear. What is read: `tulle.models.source`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format.pack import (
    LEVELS,
    STORAGE,
    bf16_to_f32,
    f32_to_bf16,
    unpack_scale,
    unpack_stored,
    unpack_zero_point,
)
from tulle.format.spec import LinearSpec
from tulle.models.description import GatedDeltaNet, LatentAttention
from tulle.models.gguf.source import GgufSource
from tulle.models.source import TensorSource, describe_source, open_source, packed_by_tulle, require_finite
from tulle.models.tensor_file import FLOATS, as_float32


class Checkpoint:
    """The tensors of a checkpoint, mapped."""

    def __init__(self, source: TensorSource | Path):
        self.source = open_source(source) if isinstance(source, Path) else source
        self.path, self.config = self.source.path, self.source.config

    def identity(self) -> str:
        """Changes with the model's files."""
        return self.source.identity()

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """As stored. Raises ``UserError`` where it is missing or of another shape."""
        found = self.source.read(name)
        if shape is not None and found.shape != shape:
            raise UserError(f"expected {name} of shape {list(shape)}, found {list(found.shape)}")
        return found

    def dtype(self, name: str) -> str:
        """As the file calls it."""
        return self.source.info(name).dtype

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """In float32."""
        found = self.tensor(name, shape)
        return as_float32(found, self.dtype(name))

    def kernel_floats(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Bits of bfloat16 (uint16) as they are, everything else in float32: what the kernels read."""
        found = self.tensor(name, shape)
        return found if self.dtype(name) == "BF16" else found.astype(np.float32, copy=False)


@dataclass
class StoredLinear:
    """A linear, unpacked: codes (uint8) with scales, or float weights (uint16 bits of bfloat16, or float32)."""

    values: NDArray[Any]
    """``[C_out, C_in]``"""
    mask: NDArray[np.bool_] | None = None
    """``[C_out, C_in]``, True = stored; None: all are."""
    bits: int | None = None
    """Of the codes; None: weights in floats."""
    scale: NDArray[Any] | None = None
    """``[C_out, G]``, of codes: bits of bfloat16 (uint16), float16, float32, or uint8 with ``row_scale``."""
    zero_point: NDArray[np.uint8] | None = None
    """``[C_out, G]``; None: ``zero``, or where that is None too 2^(bits − 1)."""
    minimum: NDArray[Any] | None = None
    """``[C_out, G]``, of the scale's dtype: weight = scale·(code − zero point) + minimum; None: 0."""
    zero: int | None = None
    row_scale: NDArray[np.float32] | None = None
    """``[C_out]``, what scales in uint8 are multiplied with."""

    def with_whole_scales(self) -> StoredLinear:
        """Scales in uint8 multiplied with their rows', in float32, which holds them exactly."""
        if self.row_scale is None or self.scale is None:
            return self
        return replace(self, scale=self.scale.astype(np.float32) * self.row_scale[:, None], row_scale=None)

    def with_rows(self, order: NDArray[np.int64]) -> StoredLinear:
        """Row i being row ``order[i]``."""

        def ordered(x: Any) -> Any:
            return x[order] if isinstance(x, np.ndarray) else x

        return StoredLinear(**{field.name: ordered(getattr(self, field.name)) for field in fields(self)})

    def with_width(self, width: int) -> StoredLinear:
        """Every row cut into several of so many inputs, whose scales lie within one of them."""
        rows = self.values.size // width

        def cut(x: Any) -> Any:
            if not isinstance(x, np.ndarray):
                return x
            return x.repeat(rows // len(x)) if x.ndim == 1 else x.reshape(rows, -1)

        return StoredLinear(**{field.name: cut(getattr(self, field.name)) for field in fields(self)})

    def floats(self) -> NDArray[np.float32]:
        """``[C_out, C_in]``: what codes stand for, without a mask."""
        whole = self.with_whole_scales()
        if whole.scale is None or whole.bits is None:
            return bf16_to_f32(self.values) if self.values.dtype == np.uint16 else self.values
        scale = wide(whole.scale)
        zero: Any = 1 << (whole.bits - 1) if whole.zero is None else whole.zero
        if whole.zero_point is not None:
            zero = whole.zero_point.astype(np.float32)[:, :, None]
        grouped = whole.values.reshape(*whole.scale.shape, -1).astype(np.float32) - np.float32(zero)
        grouped *= scale[:, :, None]
        if whole.minimum is not None:
            grouped += wide(whole.minimum)[:, :, None]
        return grouped.reshape(whole.values.shape)


def wide(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Scales or minima in float32; uint16 are bits of bfloat16."""
    return bf16_to_f32(numbers) if numbers.dtype == np.uint16 else numbers.astype(np.float32)


def _finite(name: str, found: StoredLinear) -> StoredLinear:
    """Raises ``UserError`` where weights or scales of a linear are not finite."""
    if found.bits is None:
        require_finite(f"{name}.weight", found.values, "BF16" if found.values.dtype == np.uint16 else "F32")
    for suffix, numbers in (("scale", found.scale), ("row_scale", found.row_scale)):
        if numbers is not None and numbers.dtype != np.uint8:
            require_finite(f"{name}.{suffix}", numbers, "BF16" if numbers.dtype == np.uint16 else "F32")
    return found


def kernel_bits(spec: LinearSpec) -> int | None:
    """Of a linear's codes as the kernels get them: floats of 4 bits become whole numbers of 5 (0 to 24)."""
    return 5 if spec.format != "int" else spec.bits


def rows_by_kind(mixer: GatedDeltaNet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the outputs of a delta net's two fused linears stand, which go key head by key head, in the order of the
    kernels: all queries, keys, values, z; all b, a."""
    shared = mixer.value_heads // mixer.key_heads
    values = shared * mixer.value_dim

    def of(*widths: int) -> NDArray[np.int64]:
        by_head = np.arange(mixer.key_heads * sum(widths)).reshape(mixer.key_heads, -1)
        ends = np.cumsum(widths)
        parts = [by_head[:, end - width : end] for width, end in zip(widths, ends, strict=True)]
        return np.concatenate([part.reshape(-1) for part in parts])

    return of(mixer.key_dim, mixer.key_dim, values, values), of(shared, shared)


class Source(Checkpoint):
    """A checkpoint of a decoder.

    ``groups``: of every block the full names of the linears that share an input, a tuple for each of
    ``Layer.all_groups()``.
    ``shapes``: of all of them, ``(C_out, C_in)``. ``biased``: those that have a
    bias. ``specs``: how they are packed; a linear without one is dense. ``row_orders``: of linears whose rows the
    kernels want in another order, which row comes where. ``absorbed``: linears of latent attention that are run as
    ``tulle.engine.latent`` has them, and the mixer that each belongs to.
    """

    def __init__(self, source: TensorSource | Path):
        super().__init__(source)
        self.packed = packed_by_tulle(self.source)
        self.specs: dict[str, LinearSpec] = dict(self.packed.linears) if self.packed else {}
        self.description = describe_source(self.source, self.specs)
        layers = self.description.layers
        self.groups = [
            [tuple(layer.prefix + name for name in group.names) for group in layer.all_groups()] for layer in layers
        ]
        self.shapes = {layer.prefix + linear.name: linear.shape for layer in layers for linear in layer.linears()}
        self.biased = {layer.prefix + linear.name for layer in layers for linear in layer.linears() if linear.bias}

        # Quantisers of heads' keys and values need these.
        expanded = self.packed is not None and self.packed.attention is not None
        self.absorbed = {
            layer.prefix + layer.group("kv_up").names[0]: layer.mixer
            for layer in layers
            if isinstance(layer.mixer, LatentAttention) and not expanded
        }
        self.row_orders: dict[str, NDArray[np.int64]] = {}
        for layer in layers:
            if isinstance(layer.mixer, GatedDeltaNet) and layer.mixer.fused:
                names = [layer.prefix + name for name in layer.group("qkv").names]
                self.row_orders |= dict(zip(names, rows_by_kind(layer.mixer), strict=True))

    def coded(self, name: str, shape: tuple[int, int]) -> StoredLinear | None:
        """A tensor (``NAME.weight``) that is stored in codes, packed or another tool's, as it is; None of one in
        floats."""
        module = name.removesuffix(".weight")
        if (spec := self.specs.get(module)) is not None:
            return None if spec.bits is None else _finite(module, self._packed(module, shape, spec))
        if not isinstance(self.source, GgufSource) or (found := self.source.coded(name)) is None:
            return None
        if found.codes.shape != shape:
            raise UserError(f"expected {name} of shape {list(shape)}, found {list(found.codes.shape)}")
        return StoredLinear(found.codes, None, found.bits, found.scale, minimum=found.minimum, zero=found.zero)

    def coded_bits(self, name: str) -> int | None:
        """Of the codes that a tensor is stored in, without reading it; None of one in floats."""
        if (spec := self.specs.get(name.removesuffix(".weight"))) is not None:
            return spec.bits
        return self.source.bits(name) if isinstance(self.source, GgufSource) else None

    def scale_width(self, name: str) -> int | None:
        """How many numbers of a row share a scale, of a tensor that is stored in codes; None of one in floats."""
        if (spec := self.specs.get(name.removesuffix(".weight"))) is not None:
            return None if spec.bits is None else spec.group_size or spec.shape[1]
        return self.source.scale_width(name) if isinstance(self.source, GgufSource) else None

    def embedding_name(self) -> str:
        """The embedding's name in the files."""
        return self.description.embedding_name(self)

    def head_name(self) -> str:
        """The output head's name in the files."""
        return self.embedding_name() if self.description.tied else self.description.head

    def linear(self, name: str) -> StoredLinear:
        """A linear, unpacked. Raises ``UserError`` where its tensors are missing, damaged, not finite or do not fit."""
        return _finite(name, self._linear(name))

    def require_finite(self) -> None:
        """Raises ``UserError`` where a tensor besides the linears' weights, which are checked as they are read, holds
        NaN or Inf. Reads them all: for when the engine's copy of the weights is made."""
        model = self.description
        linears = {f"{name}.weight" for name in (*self.shapes, *self.specs)}
        names = (model.outer_tensors().keys() - {model.embedding}) | {self.embedding_name(), self.head_name()}
        names |= {layer.prefix + name for layer in model.layers for name in layer.tensors()}
        names |= {
            f"{name}.{suffix}"
            for name, spec in self.specs.items()
            for suffix in spec.stored_tensors().keys() - spec.tensors().keys()
        }
        for name in sorted(names - linears):
            if (kind := self.dtype(name)) in FLOATS:
                require_finite(name, self.tensor(name), kind)

    def _linear(self, name: str) -> StoredLinear:
        shape, spec = self.shapes[name], self.specs.get(name)
        if spec is None and (coded := self.coded(f"{name}.weight", shape)) is not None:
            return coded
        if spec is None:
            return StoredLinear(self.kernel_floats(f"{name}.weight", shape))
        return self._packed(name, shape, spec)

    def _packed(self, name: str, shape: tuple[int, int], spec: LinearSpec) -> StoredLinear:
        if spec.shape != shape:
            raise UserError(f"expected {name} of shape {list(shape)}, found {list(spec.shape)} in quantization_config")
        arrays = {suffix: self._as_stored(f"{name}.{suffix}", kind) for suffix, (kind, _) in spec.tensors().items()}
        try:
            values, mask = unpack_stored(spec, arrays)
        except UserError as error:
            raise UserError(f"{name}, {error}") from None
        if spec.bits is None and spec.values_dtype != "bfloat16":
            values = values.astype(np.float32)
        if spec.format != "int":
            # Twice the floats are whole numbers, and half a scale is a bfloat16: these kernels compute the same.
            codes = (LEVELS - LEVELS.min()).astype(np.uint8)[values]
            scale = f32_to_bf16(unpack_scale(spec, arrays))
            return StoredLinear(codes, mask, kernel_bits(spec), scale, zero=-int(LEVELS.min()))
        row_scale = bf16_to_f32(arrays["row_scale"]) if "row_scale" in arrays else None
        zero_point = unpack_zero_point(spec, arrays)
        return StoredLinear(values, mask, spec.bits, arrays.get("scale"), zero_point, row_scale=row_scale)

    def _as_stored(self, name: str, kind: str) -> NDArray[Any]:
        found = self.tensor(name)
        if found.dtype != np.dtype(STORAGE.get(kind, kind)):
            raise UserError(f"expected {name} in {kind}, found {self.dtype(name)}")
        return found
