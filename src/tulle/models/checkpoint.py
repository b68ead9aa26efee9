"""Hugging Face checkpoints on disk, read and written block by block.

Only safetensors: a pickle is never opened. Files are memory-mapped and read one tensor at a time, so that memory is
what the caller holds, not the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tulle.core.grid import all_finite
from tulle.errors import UserError
from tulle.models.description import Decoder, Layer, describe

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json",
)  # fmt: skip
"""Files that travel with a model unchanged (glob patterns)."""


@dataclass(frozen=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def bytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * self.dtype.itemsize


class Checkpoint:
    """A local checkpoint folder: config, tensor index, tensors on demand."""

    def __init__(self, path: Path, config: dict[str, Any], infos: dict[str, TensorInfo]):
        self.path = path
        self.config = config
        self._infos = infos

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads the config and every shard's header; no tensor data.

        Raises ``UserError`` for a folder, config, shard or header that is missing or broken.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"expected a model folder, found nothing at {folder}; give the path of a local checkpoint")
        config = read_json(folder / "config.json", "a model's config.json")
        infos: dict[str, TensorInfo] = {}
        for file in _files(folder):
            infos.update(_header(file))
        listed = _weight_map(folder)
        for name, shard in listed.items():
            if name not in infos:
                raise UserError(
                    f"expected tensor {name} in {shard} as {INDEX} says, found no such tensor; copy the shard again"
                )
        return cls(folder, config, infos)

    def names(self) -> list[str]:
        return sorted(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Raises ``UserError`` when the tensor is missing."""
        try:
            return self._infos[name]
        except KeyError:
            raise UserError(
                f"expected tensor {name} in {self.path.name}, found none; "
                "the checkpoint is incomplete or of another architecture"
            ) from None

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype. Raises ``UserError`` when it is missing or unreadable."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors; every shard they need is mapped once and unmapped before returning."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.info(name).file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with _opened(file) as shard:
                for name in wanted:
                    # clone: a tensor that still points into the mapping would keep the whole shard resident.
                    found[name] = shard.get_tensor(name).clone()
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self._infos.values())

    def describe(self) -> Decoder:
        """The model's description, every tensor it needs checked for presence, shape and a floating dtype."""
        model = describe(self.config)
        expected = {layer.prefix + k: s for layer in model.layers for k, s in layer.tensors().items()}
        for name, shape in (model.outer_tensors() | expected).items():
            stored = model.embedding_name(self) if name == model.embedding else name
            info = self.info(stored)
            if info.shape != shape:
                raise UserError(
                    f"expected {stored} of shape {list(shape)} by config.json, found {list(info.shape)}; "
                    "config and weights are not of one model"
                )
            if not info.dtype.is_floating_point:
                raise UserError(
                    f"expected {stored} as bf16, fp16 or fp32, found {info.dtype}; give the unquantised checkpoint"
                )
        return model

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        """All tensors of a layer by relative name, in stored dtype, checked to be finite."""
        relative = layer.tensors()
        tensors = self.read_many(layer.prefix + name for name in relative)
        for name, tensor in tensors.items():
            require_finite(name, tensor)
        return {name: tensors[layer.prefix + name] for name in relative}


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises ``UserError`` when a weight is NaN or infinite."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"expected finite weights, found {bad} NaN or Inf in {name}; the checkpoint is damaged, copy it again"
        )


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises ``UserError`` when the file is missing or is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"expected {what}, found no {file}; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"expected {what} as JSON, found {file} unreadable ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"expected {what} as a JSON object, found a {type(content).__name__} in {file}; copy it again")
    return content


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


def _weight_map(folder: Path) -> dict[str, str]:
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    weight_map = read_json(folder / INDEX, "a shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"expected weight_map in {folder / INDEX}, found none; copy the index again")
    return weight_map


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = sorted(set(_weight_map(folder).values()))
    if not names:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        tail = (
            "it holds pickled weights, which are never loaded: convert them to safetensors"
            if pickled
            else "check the path"
        )
        raise UserError(f"expected {SINGLE} or {INDEX} in {folder}, found neither; {tail}")
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise UserError(f"expected {len(names)} shards in {folder}, found {missing[0]} missing; copy it again")
    return [folder / n for n in names]


def _header(file: Path) -> dict[str, TensorInfo]:
    with _opened(file) as shard:
        infos = {}
        for name in shard.keys():  # noqa: SIM118 (not a mapping)
            piece = shard.get_slice(name)
            code = piece.get_dtype()
            if code not in DTYPES:
                raise UserError(f"expected a dtype of {', '.join(DTYPES)}, found {code} for {name} in {file.name}")
            infos[name] = TensorInfo(DTYPES[code], tuple(piece.get_shape()), file)
        return infos


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise UserError(
            f"expected a whole safetensors file, found {file} truncated or corrupt ({error}); copy it again"
        ) from None
    except FileNotFoundError:
        raise UserError(f"expected the shard {file}, found it missing; copy it again") from None


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
