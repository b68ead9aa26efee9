"""Checkpoints that hold all experts of a layer in one tensor, read as if every expert had linears of its own.

Three layouts, by their names: transformers' own (``experts.gate_up_proj`` ``[E, 2·I, d]``, gate's rows, then up's;
``experts.down_proj`` ``[E, d, I]``), Granite's (``input_linear.weight`` and ``output_linear.weight`` of the same
shapes), and gpt-oss' (``[E, d, 2·I]``, gate and up by turns, with biases), whose weights may be stored in MXFP4:
``_blocks`` ``[E, rows, G, 16]`` of two E2M1 codes a byte, and ``_scales`` ``[E, rows, G]`` (OCP Microscaling 1.0).

One expert is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format.pack import BYTE_SCALES, LEVELS, f32_to_bf16
from tulle.models.tensor_file import TensorInfo

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

STACK = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")
GRANITE = re.compile(r"(.+\.block_sparse_moe)\.(input|output)_linear\.weight")
MXFP4_GROUP = 32


@dataclass(frozen=True)
class _Part:
    """Where a linear's weight or bias stands in a tensor of all experts."""

    stored: str
    expert: int
    rows: slice
    """Of the linear's outputs."""
    transposed: bool = False
    scales: str | None = None
    """The tensor of scales, where ``stored`` holds MXFP4's blocks."""


class Stacked:
    """A source whose experts' tensors are ``PREFIX.experts.E.gate_proj.weight``, ``up_proj``, ``down_proj``."""

    def __init__(self, base: TensorSource):
        self._base, self.plain = base, base.plain
        self.path, self.tokenizer, self.config, self.notes = base.path, base.tokenizer, base.config, base.notes
        self.files: Sequence[Path] = base.files
        settings = base.config.get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method") == "mxfp4":
            self.config = {key: value for key, value in base.config.items() if key != "quantization_config"}
        self._parts: dict[str, _Part] = {}
        self._plain: set[str] = set()
        for name in base.names():
            if (stack := STACK.fullmatch(name)) is not None:
                self._stack(name, stack[1], stack[2], stack[3] or "")
            elif (granite := GRANITE.fullmatch(name)) is not None:
                kind = "gate_up_proj" if granite[2] == "input" else "down_proj"
                self._add(name, f"{granite[1]}.experts", kind, "weight")
            else:
                self._plain.add(name)

    def _stack(self, name: str, prefix: str, kind: str, suffix: str) -> None:
        if suffix == "_scales":
            return
        if suffix == "_blocks":
            scales = f"{prefix}.{kind}_scales"
            if scales not in self._base:
                raise UserError(f"expected {scales} beside {name}, found none; the checkpoint is incomplete")
            self._add(name, prefix, kind, "weight", scales, by_turns=True)
            return
        by_turns = self.config.get("model_type") == "gpt_oss"
        self._add(name, prefix, kind, "bias" if suffix else "weight", None, by_turns, by_turns and not suffix)

    def _add(
        self,
        name: str,
        prefix: str,
        kind: str,
        what: str,
        scales: str | None = None,
        by_turns: bool = False,
        transposed: bool = False,
    ) -> None:
        shape = self._base.info(name).shape
        if len(shape) != (2 if what == "bias" else 4 if scales else 3):
            raise UserError(f"expected a tensor of all experts as {name}, found shape {shape}; copy the model again")
        rows = shape[-1] if transposed else shape[1]
        found = {"down_proj": slice(None)}
        if kind == "gate_up_proj":
            found = {"gate_proj": slice(rows // 2), "up_proj": slice(rows // 2, None)}
            if by_turns:
                found = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        for expert in range(shape[0]):
            for own, part in found.items():
                self._parts[f"{prefix}.{expert}.{own}.{what}"] = _Part(name, expert, part, transposed, scales)

    def names(self) -> list[str]:
        return sorted([*self._plain, *self._parts])

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._plain

    def info(self, name: str) -> TensorInfo:
        part = self._parts.get(name)
        if part is None:
            return self._base.info(name)
        stored = self._base.info(part.stored)
        shape = stored.shape[1:]
        if part.scales is not None:
            shape = (shape[0], shape[1] * MXFP4_GROUP)
        elif part.transposed:
            shape = shape[::-1]
        shape = (len(range(*part.rows.indices(shape[0]))), *shape[1:])
        if part.scales is not None:
            size = shape[0] * shape[1] * 17 // MXFP4_GROUP
            return TensorInfo("BF16", shape, stored.file, "mxfp4", size)
        return replace(stored, shape=shape)

    def read(self, name: str) -> NDArray[Any]:
        part = self._parts.get(name)
        if part is None:
            return self._base.read(name)
        found = self._base.read(part.stored)[part.expert]
        if part.scales is not None:
            return mxfp4(found[part.rows], self._base.read(part.scales)[part.expert][part.rows])
        return np.ascontiguousarray((found.T if part.transposed else found)[part.rows])

    def identity(self) -> str:
        return self._base.identity()


def mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The bfloat16 bits ``[rows, 32·G]`` of blocks ``[rows, G, 16]``, low halves of bytes first, and scales
    ``[rows, G]``; exact."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, MXFP4_GROUP)
    values = LEVELS[codes] * (BYTE_SCALES["mxfp4"][scales] * np.float32(0.5))[..., None]  # levels are twice the floats
    return f32_to_bf16(values.reshape(len(scales), -1))


def is_stacked(source: TensorSource) -> bool:
    return any(STACK.fullmatch(name) or GRANITE.fullmatch(name) for name in source.names())
