"""FP8 checkpoints, as DeepSeek V3 and Qwen 3 ("fp8") and FBGEMM ("fbgemm_fp8") are published.

A linear W ``[C_out, C_in]``:

    weight             float8 E4M3 [C_out, C_in]
    weight_scale_inv   float [⌈C_out/B⌉, ⌈C_in/B'⌉], blocks of B×B' as weight_block_size says (128×128)
    weight_scale       instead of it: one number, or one per output [C_out] or [C_out, 1]

    W = weight · its scale

("inv" is the publishers' word: the weight is multiplied with it.) Scales may be powers of two in 8 bits (ue8m0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format.pack import E4M3
from tulle.models.foreign._parts import floats, require, scale_rows, with_suffix

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

SCALES = ("F32", "BF16", "F16", "F8_E8M0")


class Fp8:
    title = "FP8"
    suffixes = ("weight", "weight_scale_inv", "weight_scale", "input_scale_ub")

    def __init__(self, block: tuple[int, int] | None):
        self.block = block

    def linears(self, stored: TensorSource) -> set[str]:
        return {name for name in with_suffix(stored, "weight") if stored.info(f"{name}.weight").dtype.startswith("F8")}

    def holder(self, stored: TensorSource, name: str) -> str:
        return f"{name}.weight"

    def check(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> None:
        outputs, inputs = shape
        require(stored, f"{name}.weight", ("F8_E4M3",), shape)
        scale, shapes = self._scale(stored, name), [(), (1,), (1, 1), (outputs,), (outputs, 1)]
        if self.block:
            shapes.append(self._blocks(outputs, inputs))
        require(stored, scale, SCALES, *shapes)

    def dequantise(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        outputs, inputs = shape
        weight = E4M3[stored.read(f"{name}.weight")]
        scale = floats(stored, self._scale(stored, name))
        if self.block and scale.shape == self._blocks(outputs, inputs):
            return scale_rows(weight, scale, None, np.arange(inputs) // self.block[1], self.block[0])
        weight *= scale.reshape(-1, 1)
        return weight

    def _blocks(self, outputs: int, inputs: int) -> tuple[int, int]:
        """How many blocks a matrix has."""
        assert self.block is not None
        return -(-outputs // self.block[0]), -(-inputs // self.block[1])

    def _scale(self, stored: TensorSource, name: str) -> str:
        both = [f"{name}.{suffix}" for suffix in ("weight_scale_inv", "weight_scale")]
        found = [scale for scale in both if scale in stored]
        if len(found) != 1:
            raise UserError(
                f"expected one of weight_scale_inv and weight_scale for {name} in FP8, found {len(found)}; the "
                "checkpoint is incomplete"
            )
        return found[0]


def from_config(settings: Mapping[str, Any]) -> Fp8:
    """Raises ``UserError`` for a variant that is not read."""
    form = settings.get("fmt") or "e4m3"
    if form != "e4m3":
        raise UserError(f"expected FP8 of format e4m3, found {form!r}; give the unquantised checkpoint")
    block = settings.get("weight_block_size")
    if block is None:
        return Fp8(None)
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UserError(f"expected two sizes as weight_block_size, found {block!r}; repair config.json")
    return Fp8((block[0], block[1]))
