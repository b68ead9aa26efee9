"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them. Frantar et al. 2022 is the method; this is the storage.

A linear of C_in inputs and C_out outputs, b bits (2, 3, 4 or 8), G groups of inputs:

    qweight  int32 [C_in·b/32, C_out]   codes q, packed along the inputs
    qzeros   int32 [G, C_out·b/32]      zeros, packed along the outputs
    scales   float [G, C_out]
    g_idx    int32 [C_in]               group of each input; with act-order (desc_act) in any order

    W[o, i] = scales[g, o]·(q[i, o] − z[g, o]),  g = g_idx[i]

The format of 2022 ("gptq") stores z − 1: the words of qzeros as a whole have 1 subtracted from every field, so that a
zero of 0 borrows from its neighbour. "gptq_v2" stores z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.foreign._parts import (
    floats,
    groups_of,
    require,
    rows_of,
    scale_rows,
    unpack_words,
    with_suffix,
    words_of,
)

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What a stored zero lacks."""


class Gptq:
    title = "GPTQ's format"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, offset: int):
        self.offset = offset

    def linears(self, stored: TensorSource) -> set[str]:
        return with_suffix(stored, "qweight")

    def holder(self, stored: TensorSource, name: str) -> str:
        return f"{name}.qweight"

    def check(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> None:
        outputs, inputs = shape
        bits = self._bits(stored, name, inputs)
        groups = rows_of(stored, f"{name}.scales")
        require(stored, f"{name}.qweight", ("I32",), (words_of(inputs, bits), outputs))
        require(stored, f"{name}.scales", ("F16", "BF16", "F32"), (groups, outputs))
        require(stored, f"{name}.qzeros", ("I32",), (groups, words_of(outputs, bits)))
        if f"{name}.g_idx" in stored:
            require(stored, f"{name}.g_idx", ("I32", "I64"), (inputs,))
        elif inputs % groups:
            raise UserError(f"expected {name}.g_idx for {groups} groups of {inputs} inputs, found none; copy it again")

    def dequantise(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        outputs, inputs = shape
        bits = self._bits(stored, name, inputs)
        codes = unpack_words(stored.read(f"{name}.qweight").T, bits, inputs)  # [C_out, C_in]
        zeros = self._zeros(stored.read(f"{name}.qzeros"), bits, outputs).T.astype(np.float32)  # [C_out, G]
        scales = floats(stored, f"{name}.scales").T
        group = groups_of(stored, f"{name}.g_idx", inputs, scales.shape[1])
        return scale_rows(codes.astype(np.float32), scales, zeros, group)

    def _bits(self, stored: TensorSource, name: str, inputs: int) -> int:
        """By the shape, since a checkpoint may mix them."""
        rows = rows_of(stored, f"{name}.qweight")
        for bits in BITS:
            if words_of(inputs, bits) == rows:
                return bits
        raise UserError(
            f"expected {name}.qweight of {', '.join(str(words_of(inputs, b)) for b in BITS)} rows (codes of "
            f"{', '.join(map(str, BITS))} bits), found {rows}; config and weights are not of one model"
        )

    def _zeros(self, words: NDArray[Any], bits: int, outputs: int) -> NDArray[np.uint8]:
        if self.offset and 32 % bits == 0:
            ones = sum(1 << shift for shift in range(0, 32, bits))
            return unpack_words((words.view(np.uint32) + np.uint32(ones)).view(np.int32), bits, outputs)
        return (unpack_words(words, bits, outputs) + np.uint8(self.offset)) & np.uint8((1 << bits) - 1)


def from_config(settings: Mapping[str, Any]) -> Gptq:
    """Raises ``UserError`` for a variant that is not read."""
    found = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    found = "marlin" if settings.get("is_marlin_format") else found
    if not isinstance(found, str) or found not in FORMATS:
        raise UserError(
            f"expected a GPTQ checkpoint_format of {', '.join(FORMATS)}, found {found!r}; save it as gptq or give the "
            "unquantised checkpoint"
        )
    bits = settings.get("bits")
    if bits not in BITS:
        raise UserError(f"expected GPTQ of {', '.join(map(str, BITS))} bits, found {bits!r}; repair config.json")
    return Gptq(FORMATS[found])
