"""AWQ checkpoints, as AutoAWQ writes them (version "gemm"). Lin et al. 2023 is the method; this is the storage.

A linear of C_in inputs and C_out outputs, 4 bits, groups of g inputs:

    qweight  int32 [C_in, C_out/8]      codes q, 8 outputs per word
    qzeros   int32 [C_in/g, C_out/8]    zeros z, likewise
    scales   float [C_in/g, C_out]

    W[o, i] = scales[i/g, o]·(q[i, o] − z[i/g, o])

Field k of a word (bits 4k … 4k + 3) belongs to output ORDER[k] of the word's eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.foreign._parts import floats, require, rows_of, unpack_words, with_suffix

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FIELD = np.argsort(ORDER)
"""Field of each output."""


class Awq:
    title = "AWQ's format"
    suffixes = ("qweight", "qzeros", "scales")

    def linears(self, stored: TensorSource) -> set[str]:
        return with_suffix(stored, "qweight")

    def holder(self, stored: TensorSource, name: str) -> str:
        return f"{name}.qweight"

    def check(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> None:
        outputs, inputs = shape
        groups = rows_of(stored, f"{name}.scales")
        if outputs % 8 or inputs % groups:
            raise UserError(
                f"expected {name} with outputs in eights and equal groups of inputs, found {outputs} outputs and "
                f"{groups} groups of {inputs} inputs; config and weights are not of one model"
            )
        require(stored, f"{name}.qweight", ("I32",), (inputs, outputs // 8))
        require(stored, f"{name}.qzeros", ("I32",), (groups, outputs // 8))
        require(stored, f"{name}.scales", ("F16", "BF16", "F32"), (groups, outputs))

    def dequantise(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        outputs, inputs = shape
        scales = floats(stored, f"{name}.scales")
        groups = len(scales)
        codes = self._fields(stored.read(f"{name}.qweight"), outputs).reshape(groups, -1, outputs)
        zeros = self._fields(stored.read(f"{name}.qzeros"), outputs)
        weight = np.empty((inputs, outputs), np.float32)
        grouped = weight.reshape(codes.shape)
        np.subtract(codes, zeros[:, None], out=grouped, dtype=np.float32)
        grouped *= scales[:, None]
        return np.ascontiguousarray(weight.T)

    def _fields(self, words: NDArray[Any], outputs: int) -> NDArray[np.uint8]:
        """int32 ``[R, C_out/8]`` → codes ``[R, C_out]``."""
        fields = unpack_words(words, 4, outputs).reshape(len(words), -1, 8)
        return np.take(fields, FIELD, axis=2).reshape(len(words), outputs)


def from_config(settings: Mapping[str, Any]) -> Awq:
    """Raises ``UserError`` for a variant that is not read."""
    version = str(settings.get("version") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm":
        raise UserError(
            f"expected AWQ of version gemm, found {version!r}; save it as gemm or give the unquantised checkpoint"
        )
    if bits != 4:
        raise UserError(f"expected AWQ of 4 bits, found {bits!r}; give the unquantised checkpoint")
    if settings.get("zero_point") is False:
        raise UserError("expected AWQ with zero points, found zero_point false; give the unquantised checkpoint")
    return Awq()
