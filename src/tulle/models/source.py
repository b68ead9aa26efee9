"""Where a model comes from: one reader for all commands, without torch.

:func:`open_source` finds out what a path is and gives a :class:`TensorSource`: the config as ``config.json`` would say
it, and tensors by the names that transformers gives them, one at a time. What is stored in another way (another tool's
quantised format, a base model without its prefix, an adapter) is a source of its own that reads another one. The torch
side (:mod:`tulle.models.checkpoint`) and the engine (:mod:`tulle.engine.checkpoint`) both stand on this file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format.spec import QUANT_METHOD, QuantizationConfig
from tulle.models.adapter import is_adapter, open_adapter
from tulle.models.description import Decoder, describe
from tulle.models.foreign import open_foreign
from tulle.models.gguf.file import is_gguf
from tulle.models.renamed import base_model, is_base_model
from tulle.models.stacked import Stacked, is_stacked
from tulle.models.tensor_file import TensorFile, TensorInfo, as_float32
from tulle.models.text_part import has_text_part, text_part

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")

COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
"""Ends of names of tensors that old checkpoints hold and everybody computes."""
ROWS = 4096
"""Of two tables that are compared at once."""


class TensorSource(Protocol):
    """A model's config and tensors.

    Another kind of file (GGUF) joins by implementing this and a line in :func:`open_source`.
    """

    path: Path
    """What the user gave: a folder or a file."""
    config: dict[str, Any]
    """As ``config.json`` would have it. ``quantization_config`` is there only for what Tulle itself packed."""
    files: Sequence[Path]
    """What tensors are read from."""
    plain: bool
    """Whether transformers, given ``path``, reads the same model by itself."""
    notes: list[str]
    """What a user should know of how the model is read; one sentence each."""

    @property
    def tokenizer(self) -> Path:
        """The folder that holds the tokenizer's files."""
        ...

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape. Raises ``UserError`` when there is no such tensor."""
        ...

    def read(self, name: str) -> NDArray[Any]:
        """The tensor in the NumPy dtype of :data:`tulle.models.tensor_file.DTYPES`; it may be a view of a mapped file,
        not to be written to. Raises ``UserError`` when it is missing or unreadable."""
        ...

    def identity(self) -> str:
        """Equal as long as nothing of the model has changed (see :mod:`tulle.models.identity`)."""
        ...


def open_source(path: str | Path) -> TensorSource:
    """The model at a path; headers are read, no tensors.

    Raises ``UserError`` for a folder, config, file or header that is missing or broken, and for a format that is not
    read, by its name.
    """
    found = _opened(Path(path))
    for note in found.notes:
        tell(found.path, note)
    return found


@cache
def tell(path: Path, note: str) -> None:
    """Logs a note about a model, once, as a warning of the logger ``tulle`` (which Python writes to stderr)."""
    logging.getLogger("tulle").warning(f"note: {path.name}: {note}")


def _opened(path: Path) -> TensorSource:
    if is_gguf(path):
        from tulle.models.gguf.source import GgufSource

        return GgufSource(path)
    if not path.is_dir():
        raise UserError(f"expected a model folder, found nothing at {path}; give the path of a local checkpoint")
    if is_adapter(path):
        return open_adapter(path)
    found: TensorSource = Folder(path)
    _add_older_settings(found)
    if has_text_part(found):
        found = text_part(found)
    if is_base_model(found):
        found = base_model(found)
    if is_stacked(found):
        found = Stacked(found)
    settings = found.config.get("quantization_config")
    ours = settings is None or (isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD)
    return found if ours else open_foreign(found)


def _add_older_settings(source: TensorSource) -> None:
    """Puts what older packers wrote into a file of its own into the config."""
    if source.config.get("quantization_config") is not None or not any(n.endswith(".qweight") for n in source.names()):
        return
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (source.path / file).is_file():
            settings = {"quant_method": method} | read_json(source.path / file, "a quantiser's settings")
            source.config = source.config | {"quantization_config": settings}
            return
    raise UserError(
        f"expected quantization_config in {source.path / 'config.json'} for the packed linears there, found none; copy "
        "the whole folder"
    )


class Folder:
    """A Hugging Face folder: the tensors of ``model.safetensors``, or of the files that the index names, and no other.

    That is what transformers reads. An index that leads out of the folder is refused; symbolic links may lead to the
    hub cache's own files.
    """

    plain = True

    def __init__(self, path: Path):
        self.path = self.tokenizer = path
        self.config = read_json(path / "config.json", "a model's config.json")
        self.notes: list[str] = []
        weight_map = _weight_map(path)
        opened = {file: TensorFile(file) for file in _files(path, weight_map)}
        self.files: Sequence[Path] = tuple(opened)
        self._by_name: dict[str, TensorFile] = {}
        for file, content in opened.items():
            for name in content.names():
                # Of a tensor that stands in two shards, the one that the index names.
                if weight_map.get(name, file.name) == file.name:
                    self._by_name[name] = content
        for name, shard in weight_map.items():
            if name not in self._by_name:
                raise UserError(
                    f"expected tensor {name} in {shard} as {INDEX} says, found no such tensor; copy the shard again"
                )

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def info(self, name: str) -> TensorInfo:
        return self._file(name).info(name)

    def read(self, name: str) -> NDArray[Any]:
        return self._file(name).tensor(name)

    def identity(self) -> str:
        from tulle.models.identity import identity

        return identity(self.config, self._by_name.values())

    def _file(self, name: str) -> TensorFile:
        try:
            return self._by_name[name]
        except KeyError:
            raise missing(name, self.path) from None


def packed_by_tulle(source: TensorSource) -> QuantizationConfig | None:
    """How Tulle packed the model's linears; None where they are dense, ``quantization_config: null`` included.

    Raises ``UserError`` for another method, by its name.
    """
    settings = source.config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != QUANT_METHOD:
        raise UserError(
            f"expected a dense model or one made by tulle compress, found quant_method {method!r} in "
            f"{source.path.name}; give the original model"
        )
    return QuantizationConfig.from_json(settings)


def describe_source(source: TensorSource, packed: Collection[str] = ()) -> Decoder:
    """The model's description, as config *and* tensors say it, every tensor it needs checked for presence, shape and
    a float dtype, those of the linears ``packed`` apart.

    What transformers does where the two disagree: a model is tied only if the file does not hold two different tables;
    tensors that the config does not ask for (biases, further heads) are not read, which a note says. What it makes up
    (tensors that are missing) is refused.
    """
    model = _tied_as_stored(source, describe(source.config))
    expected = {layer.prefix + k: s for layer in model.layers for k, s in layer.tensors().items()}
    for name, shape in (model.outer_tensors() | expected).items():
        if name.removesuffix(".weight") in packed:
            continue
        stored = model.embedding_name(source) if name == model.embedding else name
        info = source.info(stored)
        if info.shape != shape:
            raise UserError(
                f"expected {stored} of shape {list(shape)} by config.json, found {list(info.shape)}; config and "
                "weights are not of one model"
            )
        if not info.is_float:
            raise UserError(
                f"expected {stored} in bf16, fp16, fp32 or fp64, found {info.dtype}; give the unquantised checkpoint"
            )
    _tell_unread(source, {*model.outer_tensors(), *expected, model.head}, packed)
    return model


def _tell_unread(source: TensorSource, read: Collection[str], packed: Collection[str]) -> None:
    """Notes what a source holds and the model does not read."""
    parts: dict[str, int] = {}
    for name in source.names():
        if name in read or name.endswith(COMPUTED) or any(module in packed for module in _modules(name)):
            continue
        part = ".".join(name.split(".")[:3])
        parts[part] = parts.get(part, 0) + 1
    if parts:
        first = ", ".join(f"{part} ({count})" for part, count in sorted(parts.items())[:3])
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        note = f"tensors that the model does not use are left out: {first}{more}"
        if note not in source.notes:
            source.notes.append(note)
        tell(source.path, note)


def _modules(name: str) -> Iterator[str]:
    """What a tensor may belong to: a.b.c belongs to a.b and to a."""
    while name := name.rpartition(".")[0]:
        yield name


def _tied_as_stored(source: TensorSource, model: Decoder) -> Decoder:
    if not model.tied or model.embedding not in source or model.head not in source:
        return model
    if same_numbers(source, model.embedding, model.head):
        return model
    note = (
        f"config.json ties the head to the embedding, but {model.head} is stored and differs: it is used, as "
        "transformers does; set tie_word_embeddings to false"
    )
    if note not in source.notes:
        source.notes.append(note)
    tell(source.path, note)
    return replace(model, tied=False)


def same_numbers(source: TensorSource, a: str, b: str) -> bool:
    """Whether two tables ``[V, d]`` hold the same numbers."""
    one, other, kinds = source.read(a), source.read(b), (source.info(a).dtype, source.info(b).dtype)
    if one.shape != other.shape or one.ndim != 2:
        return False
    for start in range(0, len(one), ROWS):
        left, right = one[start : start + ROWS], other[start : start + ROWS]
        if kinds[0] != kinds[1]:
            left, right = as_float32(left, kinds[0]), as_float32(right, kinds[1])
        if not np.array_equal(left, right):
            return False
    return True


def missing(name: str, path: Path) -> UserError:
    """What a source says of a tensor that it does not hold."""
    return UserError(
        f"expected tensor {name} in {path.name}, found none; the checkpoint is incomplete or of another architecture"
    )


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises ``UserError`` when the file is missing or is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"expected {what}, found no {file}; check the path") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"expected {what} as JSON, found {file} unreadable ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"expected {what} as a JSON object, found a {type(content).__name__} in {file}; copy it again")
    return content


def _weight_map(folder: Path) -> Mapping[str, str]:
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    weight_map = read_json(folder / INDEX, "a shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"expected weight_map (tensor → file) in {folder / INDEX}, found none; copy the index again")
    return weight_map


def _files(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = sorted(set(weight_map.values()))
    for name in names:
        _require_inside(folder, name)
    if not names:
        raise UserError(f"expected {SINGLE} or {INDEX} in {folder}, found neither; {_instead(folder)}")
    absent = [n for n in names if not (folder / n).is_file()]
    if absent:
        raise UserError(f"expected {len(names)} shards in {folder}, found {absent[0]} missing; copy it again")
    return [folder / n for n in names]


def _require_inside(folder: Path, name: str) -> None:
    """Raises ``UserError`` for a shard that an index looks for outside of the folder."""
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        try:
            target, home = (folder / name).resolve(), folder.resolve()
            target.is_file()
        except (ValueError, OSError, RuntimeError):  # no name that a file can have, or links in a circle
            raise UserError(f"expected names of files in {INDEX}, found {name!r}; copy the index again") from None
        blobs = home.parent.parent / "blobs"  # the hub's cache: snapshots/REVISION/… are links into it
        if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
            return
    raise UserError(
        f"expected shards inside {folder}, found {name!r} in {INDEX} that leads out of it; copy the "
        "file into the folder"
    )


def pickles_of(folder: Path) -> list[Path]:
    """Files of pickled weights, without what training leaves beside them."""
    beside = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "adapter_model")
    found = {file for pattern in PICKLES for file in folder.glob(pattern)}
    return sorted(file for file in found if not file.name.startswith(beside))


def _instead(folder: Path) -> str:
    if pickles := pickles_of(folder):
        return (
            f"{pickles[0].name} is a pickle, which can run anything and is never loaded: tulle export {folder} --to "
            "dense -o NEW converts it safely"
        )
    others = sorted(f.name for f in folder.glob("*.safetensors"))
    return f"{others[0]} is under a name that transformers does not read: rename it" if others else "check the path"


def require_finite(name: str, array: NDArray[Any], dtype: str) -> None:
    """Raises ``UserError`` when a float tensor holds NaN or Inf."""
    if dtype == "BF16":
        bad = int(np.count_nonzero((array & 0x7F80) == 0x7F80))
    else:
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise UserError(
            f"expected finite weights, found {bad} NaN or Inf in {name}; the checkpoint is damaged, copy it again"
        )
