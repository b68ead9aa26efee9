"""A checkpoint folder, packed or dense, read tensor by tensor and linear by linear."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.engine.files import TensorFile
from tulle.errors import UserError
from tulle.format.pack import STORAGE, bf16_to_f32, unpack_stored
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.models.description import describe


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ``UserError`` where there is none."""
    if not folder.is_dir():
        raise UserError(f"expected a model folder, found nothing at {folder}; give the path of a local checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected a model's config.json in {folder}, found none that can be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"expected an object in {folder / 'config.json'}, found {type(config).__name__}")
    return config


class Checkpoint:
    """The tensors of a checkpoint folder, mapped."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise UserError(f"expected *.safetensors in {folder}, found none; the checkpoint is incomplete")
        self._opened: dict[str, TensorFile] | None = None

    def identity(self) -> str:
        """Changes with the files."""
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return hashlib.sha256(json.dumps([self.config, stats], sort_keys=True).encode()).hexdigest()

    def __contains__(self, name: object) -> bool:
        return name in self._by_name()

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """As stored. Raises ``UserError`` where it is missing or of another shape."""
        file = self._by_name().get(name)
        if file is None:
            raise UserError(f"expected tensor {name} in {self.folder.name}, found none; the checkpoint is incomplete")
        found = file.tensor(name)
        if shape is not None and found.shape != shape:
            raise UserError(f"expected {name} of shape {list(shape)}, found {list(found.shape)}")
        return found

    def dtype(self, name: str) -> str:
        """As the file calls it."""
        self.tensor(name)
        return self._by_name()[name].dtype(name)

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """In float32."""
        found = self.tensor(name, shape)
        return bf16_to_f32(found) if self.dtype(name) == "BF16" else found.astype(np.float32)

    def kernel_floats(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Bits of bfloat16 (uint16) as they are, everything else in float32: what the kernels read."""
        found = self.tensor(name, shape)
        return found if self.dtype(name) == "BF16" else found.astype(np.float32, copy=False)

    def _by_name(self) -> dict[str, TensorFile]:
        if self._opened is None:
            self._opened = {name: opened for opened in map(TensorFile, self.files) for name in opened.names()}
        return self._opened


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
    """``[C_out, G]``, of codes: bits of bfloat16 (uint16), float16 or float32."""
    zero_point: NDArray[np.uint8] | None = None
    """``[C_out, G]``; None: ``zero``, or where that is None too 2^(bits − 1)."""
    minimum: NDArray[Any] | None = None
    """``[C_out, G]``, of the scale's dtype: weight = scale·(code − zero point) + minimum; None: 0."""
    zero: int | None = None


class Source(Checkpoint):
    """A checkpoint of a decoder.

    ``groups``: of every block the full names of the linears that share an input, one tuple for qkv, o, gate_up, down.
    ``shapes``: of all of them, ``(C_out, C_in)``. ``specs``: how they are packed; a linear without one is dense.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        found = self.config.get("quantization_config")
        self.packed = None if found is None else QuantizationConfig.from_json(found)
        self.specs: dict[str, LinearSpec] = dict(self.packed.linears) if self.packed else {}
        self.description = describe(self.config)
        layers = self.description.layers
        self.groups = [
            [tuple(layer.prefix + name for name in group.names) for group in layer.groups] for layer in layers
        ]
        self.shapes = {layer.prefix + linear.name: linear.shape for layer in layers for linear in layer.linears()}

    def embedding_name(self) -> str:
        """The embedding's name in the files."""
        return self.description.embedding_name(self)

    def head_name(self) -> str:
        """The output head's name in the files."""
        return self.embedding_name() if self.description.tied else self.description.head

    def linear(self, name: str) -> StoredLinear:
        """A linear, unpacked. Raises ``UserError`` where its tensors are missing, damaged or do not fit."""
        shape, spec = self.shapes[name], self.specs.get(name)
        if spec is None:
            return StoredLinear(self.kernel_floats(f"{name}.weight", shape))
        if spec.shape != shape:
            raise UserError(f"expected {name} of shape {list(shape)}, found {list(spec.shape)} in quantization_config")
        arrays = {suffix: self._as_stored(f"{name}.{suffix}", kind) for suffix, (kind, _) in spec.tensors().items()}
        values, mask = unpack_stored(spec, arrays)
        if spec.bits is None and spec.values_dtype != "bfloat16":
            values = values.astype(np.float32)
        return StoredLinear(values, mask, spec.bits, arrays.get("scale"), arrays.get("zero_point"))

    def _as_stored(self, name: str, kind: str) -> NDArray[Any]:
        found = self.tensor(name)
        if found.dtype != np.dtype(STORAGE.get(kind, kind)):
            raise UserError(f"expected {name} in {kind}, found {self.dtype(name)}")
        return found
