"""Checkpoints in torch, read and written block by block.

Tensors are read one at a time, so that memory is what the caller holds, not the model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tulle.core.grid import all_finite
from tulle.errors import UserError
from tulle.format.pack import unpack_linear
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.models import tensor_file
from tulle.models.description import Decoder, Layer
from tulle.models.source import (
    INDEX,
    SINGLE,
    TensorSource,
    describe_source,
    open_source,
    packed_by_tulle,
    read_json,
)

__all__ = ["INDEX", "SINGLE", "read_json"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's name of a stored dtype."""
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip
"""Files that travel with a model unchanged (glob patterns)."""


def unpacked_rows(
    read: Callable[[str], NDArray[Any]],
    name: str,
    spec: LinearSpec,
    rows: NDArray[np.int64] | None = None,
    columns: slice | None = None,
) -> Tensor:
    """The weight ``[C_out, C_in]`` of a spec, float32, or ``rows`` of one that is not sparse, whose tensors have a row
    each; ``read`` gives the tensors of ``name``. Raises ``UserError`` where one does not fit the spec."""
    stored = {}
    for suffix in spec.tensors():
        tensor = read(f"{name}.{suffix}")
        stored[suffix] = np.array(tensor if rows is None or suffix == "tensor_scale" else tensor[rows])
    try:
        found = unpack_linear(spec if rows is None else replace(spec, shape=(len(rows), spec.shape[1])), stored)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return torch.from_numpy(found if columns is None else np.ascontiguousarray(found[:, columns]))


@dataclass(frozen=True)
class TensorInfo:
    """What is stored of one tensor, in torch's words."""

    stored: tensor_file.TensorInfo

    @property
    def dtype(self) -> torch.dtype:
        """Raises ``UserError`` for a dtype that cannot be read."""
        try:
            return DTYPES[self.stored.dtype]
        except KeyError:
            raise UserError(
                f"expected a dtype of {', '.join(DTYPES)}, found {self.stored.dtype} in {self.file.name}"
            ) from None

    @property
    def name(self) -> str:
        """Of the dtype: torch's word, or the file's where torch has none or the tensor is read as another one."""
        if self.stored.stored_as is not None:
            return self.stored.stored_as
        known = DTYPES.get(self.stored.dtype)
        return self.stored.dtype if known is None else str(known).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def bytes(self) -> int:
        return self.stored.bytes


class Checkpoint:
    """A local checkpoint: config, tensor index, tensors on demand. What it is read from is a
    :class:`tulle.models.source.TensorSource`."""

    def __init__(self, source: TensorSource):
        self.source, self.path, self.config = source, source.path, source.config

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads the config and every file's header; no tensor data.

        Raises ``UserError`` for a folder, config, shard or header that is missing or broken.
        """
        return cls(open_source(path))

    @property
    def packed(self) -> QuantizationConfig | None:
        """How Tulle packed the linears; None for a dense model."""
        return packed_by_tulle(self.source)

    def names(self) -> list[str]:
        return self.source.names()

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def info(self, name: str) -> TensorInfo:
        """Raises ``UserError`` when the tensor is missing."""
        return TensorInfo(self.source.info(name))

    def read(self, name: str, rows: NDArray[np.int64] | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or ``rows`` or ``columns`` of it, in its stored dtype. Raises ``UserError`` when it is missing or
        unreadable."""
        dtype, stored = self.info(name).dtype, self.source.read(name)
        stored = stored if columns is None else stored[:, columns]
        # A copy: a tensor that still pointed into the mapping would keep its pages resident.
        tensor = torch.from_numpy(np.array(stored if rows is None else stored[rows]))
        return tensor if tensor.dtype == dtype else tensor.view(dtype)

    def read_part(self, name: str, rows: Tensor | None = None, columns: slice | None = None) -> Tensor:
        """As :meth:`read`, and of a table in codes its numbers; for :class:`tulle.models.state.TokenInputs`."""
        places = None if rows is None else rows.numpy()
        spec = self.packed.linears.get(name.removesuffix(".weight")) if self.packed else None
        if spec is None:
            return self.read(name, places, columns)
        return unpacked_rows(self.source.read, name.removesuffix(".weight"), spec, places, columns)

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors."""
        return {name: self.read(name) for name in names}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.source.info(name).bytes for name in self.names())

    def describe(self) -> Decoder:
        """The model's description, checked against the tensors (:func:`tulle.models.source.describe_source`)."""
        packed = self.packed
        return describe_source(self.source, packed.linears if packed else ())

    def names_of(self, model: Decoder) -> list[str]:
        """The stored names of all tensors that a dense model needs."""
        names = [name for name in model.outer_tensors() if name != model.embedding]
        names += [layer.prefix + name for layer in model.layers for name in layer.tensors()]
        return sorted([model.embedding_name(self), *names])

    def read_layer(self, layer: Layer, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """All tensors of a layer, or those of ``names``, by relative name, in stored dtype, checked to be finite."""
        tensors = {}
        for name in layer.tensors() if names is None else names:
            tensors[name] = self.read(layer.prefix + name)
            require_finite(layer.prefix + name, tensors[name])
        return tensors


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises ``UserError`` when a weight is NaN or infinite."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"expected finite weights, found {bad} NaN or Inf in {name}; the checkpoint is damaged, copy it again"
        )


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file so that ``file`` is either absent or whole, also after a crash."""
    temporary = file.with_suffix(".tmp")
    try:
        save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, str(temporary), metadata={"format": "pt"})
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        # The library wraps the operating system's error in its text.
        raise OSError(str(error)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(temporary)
    os.replace(temporary, file)


def write_text(file: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Writes ``model.safetensors.index.json`` for ``{file name: tensor names}``."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def companions(folder: Path) -> list[Path]:
    """Tokenizer files and the like that a compressed or exported model takes along."""
    return sorted({f for pattern in COMPANIONS for f in folder.glob(pattern) if f.is_file()})


def copy_companions(source: Path, target: Path) -> None:
    """Copies them from one model folder to another."""
    for file in companions(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
