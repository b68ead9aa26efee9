"""compressed-tensors checkpoints, as llm-compressor (and ``tulle export``) writes them.

Formats of a linear W ``[C_out, C_in]`` with G groups of inputs; signed codes q of b bits in [−2^(b−1), 2^(b−1) − 1]:

    pack-quantized    weight_packed       int32 [C_out, ⌈C_in·b/32⌉]   q + 2^(b−1), a stream of bits along the inputs
                      weight_shape        int   [2]
                      weight_scale        float [C_out, G], [C_out, 1] or [1]
                      weight_zero_point   int32 [⌈C_out·b/32⌉, G]      z + 2^(b−1), along the outputs; or int8, as scale
                      weight_g_idx        int32 [C_in]                 group of each input (act-order)
    int-quantized     weight              int8  [C_out, C_in]          q; weight_scale, weight_zero_point (int8)
    float-quantized   weight              float8 E4M3                  w; also weight_scale per block

    W = weight_scale·(q − z), or weight_scale·w

naive-quantized is one of the last two. How inputs are quantised at run time is not part of a weight and is not applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format.pack import E4M3
from tulle.models.foreign._parts import (
    floats,
    groups_of,
    object_of,
    require,
    rows_of,
    scale_rows,
    unpack_words,
    with_suffix,
    words_of,
)

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
SCALES = ("BF16", "F16", "F32")


class CompressedTensors:
    title = "compressed-tensors' format"
    suffixes = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, bits: set[int], block: tuple[int, int] | None):
        self._bits_allowed, self._block = bits, block

    def linears(self, stored: TensorSource) -> set[str]:
        return with_suffix(stored, "weight_packed") | with_suffix(stored, "weight_scale")

    def holder(self, stored: TensorSource, name: str) -> str:
        packed = f"{name}.weight_packed"
        return packed if packed in stored else f"{name}.weight"

    def check(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> None:
        outputs, inputs = shape
        if f"{name}.weight_packed" in stored:
            bits = self._bits(stored, name, inputs)
            require(stored, f"{name}.weight_packed", ("I32",), (outputs, words_of(inputs, bits)))
            if f"{name}.weight_shape" in stored:
                require(stored, f"{name}.weight_shape", ("I64", "I32"), (2,))
        else:
            require(stored, f"{name}.weight", ("I8", "F8_E4M3"), shape)
        scale = f"{name}.weight_scale"
        require(stored, scale, SCALES, *self._scale_shapes(stored, scale, outputs, inputs))
        if f"{name}.weight_g_idx" in stored:
            require(stored, f"{name}.weight_g_idx", ("I32", "I64"), (inputs,))
        if f"{name}.weight_zero_point" in stored:
            found = stored.info(scale).shape
            shapes = [found]
            if f"{name}.weight_packed" in stored and len(found) == 2:
                shapes.append((words_of(outputs, self._bits(stored, name, inputs)), found[1]))
            require(stored, f"{name}.weight_zero_point", ("I32", "I8", *SCALES, "F8_E4M3"), *shapes)

    def dequantise(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        outputs, inputs = shape
        if f"{name}.weight_packed" in stored:
            self._require_shape(stored, name, shape)
            bits = self._bits(stored, name, inputs)
            codes = unpack_words(stored.read(f"{name}.weight_packed"), bits, inputs)
            weight = codes.astype(np.float32) - np.float32(1 << (bits - 1))
        else:
            bits, codes = 8, stored.read(f"{name}.weight")
            weight = E4M3[codes] if stored.info(f"{name}.weight").dtype == "F8_E4M3" else codes.astype(np.float32)
        scale = floats(stored, f"{name}.weight_scale")
        scale = scale if scale.ndim == 2 else scale.reshape(-1, 1)
        zero = self._zeros(stored, name, bits, outputs, scale.shape)
        if self._block and scale.shape == self._blocks(outputs, inputs):
            return scale_rows(weight, scale, zero, np.arange(inputs) // self._block[1], self._block[0])
        index = f"{name}.weight_g_idx"
        ordered = index in stored and (stored.read(index) < 0).all()  # −1 throughout: groups in order
        group = groups_of(stored, "" if ordered else index, inputs, scale.shape[1])
        return scale_rows(weight, scale, zero, group, outputs // len(scale))

    def _bits(self, stored: TensorSource, name: str, inputs: int) -> int:
        rows_of(stored, f"{name}.weight_packed")
        words = stored.info(f"{name}.weight_packed").shape[-1]
        fitting = [bits for bits in range(1, 9) if words_of(inputs, bits) == words]
        chosen = [bits for bits in fitting if bits in self._bits_allowed] or fitting
        if len(chosen) != 1:
            raise UserError(
                f"expected {name}.weight_packed in as many words as codes of {sorted(self._bits_allowed)} bits take "
                f"for {inputs} inputs, found {words}; the checkpoint is of an older layout or another model"
            )
        return chosen[0]

    def _scale_shapes(self, stored: TensorSource, scale: str, outputs: int, inputs: int) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (outputs, 1), (outputs,)]
        found = stored.info(scale).shape
        if len(found) == 2 and found[0] == outputs and found[1] and inputs % found[1] == 0:
            shapes.append(found)
        if self._block:
            shapes.append(self._blocks(outputs, inputs))
        return shapes

    def _blocks(self, outputs: int, inputs: int) -> tuple[int, int]:
        """How many blocks a matrix has."""
        assert self._block is not None
        return -(-outputs // self._block[0]), -(-inputs // self._block[1])

    def _require_shape(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> None:
        if f"{name}.weight_shape" in stored:
            found = tuple(int(n) for n in stored.read(f"{name}.weight_shape"))
            if found != shape:
                raise UserError(
                    f"expected {name} of shape {list(shape)} by config.json, found {list(found)} in weight_shape; "
                    "config and weights are not of one model"
                )

    def _zeros(
        self, stored: TensorSource, name: str, bits: int, outputs: int, shape: tuple[int, ...]
    ) -> NDArray[np.float32] | None:
        zero = f"{name}.weight_zero_point"
        if zero not in stored:
            return None
        info = stored.info(zero)
        if info.dtype == "I32" and f"{name}.weight_packed" in stored:
            codes = unpack_words(stored.read(zero).T, bits, outputs).T
            return codes.astype(np.float32) - np.float32(1 << (bits - 1))
        found = E4M3[stored.read(zero)] if info.dtype == "F8_E4M3" else None
        if found is None:
            found = floats(stored, zero) if info.is_float else stored.read(zero).astype(np.float32)
        return found.reshape(shape)


def from_config(settings: Mapping[str, Any]) -> CompressedTensors:
    """Raises ``UserError`` for a format that is not read."""
    parts = object_of(settings, "config_groups")
    groups = {name: object_of(parts, name) for name in parts}
    formats = [settings.get("format") or "dense", *(group.get("format") or "dense" for group in groups.values())]
    for found in formats:
        if found not in FORMATS:
            raise UserError(
                f"expected a compressed-tensors format of {', '.join(FORMATS)}, found {found!r}; give the unquantised "
                "checkpoint"
            )
    sparsity = object_of(settings, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise UserError(
            f"expected weights that are not stored sparse, found sparsity_config {sparsity.get('format')!r}; give the "
            "unquantised checkpoint"
        )
    if object_of(settings, "transform_config").get("config_groups"):
        raise UserError("expected weights without transforms, found transform_config; give the unquantised checkpoint")
    bits: set[int] = set()
    block: tuple[int, int] | None = None
    for group in groups.values():
        weights = object_of(group, "weights")
        if isinstance(weights.get("num_bits"), int):
            bits.add(weights["num_bits"])
        if weights.get("strategy") == "block":
            block = _block(weights.get("block_structure"), block)
    return CompressedTensors(bits, block)


def _block(found: Any, earlier: tuple[int, int] | None) -> tuple[int, int]:
    """Sizes of a block, which all groups share."""
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        if earlier in (None, (found[0], found[1])):
            return found[0], found[1]
    raise UserError(f"expected one block_structure of two sizes, found {found!r}; repair config.json")
