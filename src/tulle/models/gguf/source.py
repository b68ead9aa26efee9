"""A GGUF file as a model: config, tensors under their Hugging Face names, tokenizer files.

It is a :class:`tulle.models.source.TensorSource`, so that all commands read it. ``read`` gives quantised tensors in
float32, which holds them exactly (sums of types with minima are rounded once); ``coded`` gives their codes, which the
engine runs as they are stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import cache
from tulle.errors import UserError
from tulle.models.description import describe
from tulle.models.gguf import blocks, delta_net, names
from tulle.models.gguf.config import config_of, further_layers
from tulle.models.gguf.families import Family, family_of
from tulle.models.gguf.file import GgufFile
from tulle.models.tensor_file import TensorInfo

STORED = {blocks.Type.F32: "F32", blocks.Type.F16: "F16", blocks.Type.BF16: "BF16", blocks.Type.F64: "F64"}
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
TOKENIZER_VERSION = 1
"""Of the files that are made of a tokenizer: another number, another folder."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored: by itself, as that of one expert in a tensor of all, or as half of one of these."""

    file: GgufFile
    theirs: str
    expert: int | None = None
    half: int | None = None
    groups: int = 1
    """Of an expert's rows, or all, or of each of so many equal groups of them."""

    @property
    def kind(self) -> blocks.Type:
        return self.file.tensors[self.theirs].type

    @property
    def shape(self) -> tuple[int, ...]:
        found = self.file.tensors[self.theirs].shape
        if self.expert is not None:
            found = found[1:]
        if self.half is not None:
            return found[0] // 2, *found[1:]
        if self.expert is not None:
            return found
        if self.theirs.endswith(names.CONVOLUTIONS) and len(found) == 2:
            return found[0], 1, found[1]
        # A gate of one output is a row, whether or not the file says so.
        return (1, *found) if self.theirs.endswith(names.ONE_OUTPUT) and len(found) == 1 else found

    @property
    def bytes(self) -> int:
        entry = self.file.tensors[self.theirs]
        parts = 1 if self.expert is None else entry.shape[0]
        return entry.bytes // (parts if self.half is None else 2 * parts)

    def raw(self) -> NDArray[np.uint8]:
        """``[..., bytes of a row]``, of a vector one row."""
        found = self.file.raw(self.theirs)
        if self.expert is not None:
            found = found[self.expert]
        if self.half is not None:
            rows = found.reshape(self.groups, 2, self.shape[0] // self.groups, -1)
            found = np.ascontiguousarray(rows[:, self.half])
        return found.reshape(*self.shape[:-1], -1) if len(self.shape) > 1 else found.reshape(1, -1)


class GgufSource:
    """A GGUF file, or several that belong together (``NAME-00001-of-00003.gguf``: give the first).

    Raises ``UserError`` for a file that is damaged, an architecture or a type of tensor that is not read, and for
    tensors and keys that would go unread.
    """

    plain = False

    def __init__(self, path: Path):
        self.path = path
        parts = _parts(path)
        self._files = [GgufFile(part) for part in parts]
        self.files: Sequence[Path] = tuple(parts)
        self.metadata = self._files[0].metadata
        self.family = family = family_of(self.metadata)
        self._by_name: dict[str, _Place] = {}
        stored: dict[str, GgufFile] = {}
        rope: dict[str, NDArray[np.float32]] = {}
        known = ((names.ROPE,) if family.ratios else ()) + ((names.LONG, names.SHORT) if family.longrope else ())
        further, left_out = further_layers(self.metadata, family), 0
        experts = self.metadata.get(f"{family.architecture}.expert_count")
        for file in self._files:
            stored |= dict.fromkeys(file.tensors, file)
        for theirs, file in stored.items():
            if file.tensors[theirs].type not in (*blocks.FLOATS, *blocks.READERS):
                raise blocks.refused(file.tensors[theirs].type)
            ours = family.tensors.ours(theirs)
            if names.layer_of(theirs) in further:
                left_out += 1
            elif ours is not None:
                self._by_name[ours] = _Place(file, theirs)
            elif (part := family.tensors.experts(theirs)) is not None:
                for expert in range(_count(file, theirs, experts)):
                    self._by_name[part.format(expert)] = _Place(file, theirs, expert)
            elif family.experts is not None and family.experts.fused and theirs.endswith(names.GATE_UP):
                for half, kind in enumerate(("gate", "up")):
                    part = family.tensors.experts(theirs.replace("gate_up", kind))
                    assert part is not None
                    for expert in range(_count(file, theirs, experts, halves=True)):
                        self._by_name[part.format(expert)] = _Place(file, theirs, expert, half)
            elif family.delta_net and not family.tiled and theirs.endswith(f".{delta_net.BOTH}"):
                for half, part in enumerate(delta_net.PARTS_OF_BOTH):
                    name = f"model.layers.{names.layer_of(theirs)}.{part}"
                    self._by_name[name] = _Place(file, theirs, half=half, groups=self._key_heads(file, theirs))
            elif theirs in known:
                rope[theirs] = blocks.to_float32(file.raw(theirs), file.tensors[theirs].type).reshape(-1)
            else:
                raise UserError(
                    f"expected tensors that tulle knows for {self.metadata['general.architecture']}, found {theirs} in "
                    f"{path.name}; the model does something that tulle does not compute"
                )
        table = next((f.tensors[n].shape for n, f in stored.items() if n == "token_embd.weight"), None)
        if table is None or len(table) != 2:
            raise UserError(f"expected a table token_embd.weight in {path.name}, found none; the file is incomplete")
        self.config = config_of(self.metadata, table[0], stored, rope)
        self._numbers = _numbers(self.metadata, family, self.config)
        self.notes: list[str] = []
        if left_out:
            self.notes.append(f"left out: {left_out} tensors of heads for several tokens")

    def _key_heads(self, file: GgufFile, theirs: str) -> int:
        """Of delta nets, in each of which a tensor has as many b as a."""
        count, shape = self.metadata.get(f"{self.family.architecture}.ssm.group_count"), file.tensors[theirs].shape
        if type(count) is not int or count < 1 or len(shape) != 2 or shape[0] % (2 * count):
            raise UserError(f"expected b and a of {count} key heads in {theirs}, found shape {list(shape)}")
        return count

    def names(self) -> list[str]:
        return sorted([*self._by_name, *self._numbers])

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in self._numbers

    def info(self, name: str) -> TensorInfo:
        if name in self._numbers:
            return TensorInfo("F32", self._numbers[name].shape, self.path)
        place = self._find(name)
        if place.kind in STORED and not self.family.has_offset(place.theirs):
            return TensorInfo(STORED[place.kind], place.shape, place.file.path)
        return TensorInfo("F32", place.shape, place.file.path, place.kind.name, place.bytes)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor: floats as they are stored, quantised ones in float32."""
        if name in self._numbers:
            return self._numbers[name]
        place = self._find(name)
        raw, kind = place.raw(), place.kind
        if self.family.has_offset(place.theirs):
            # The offset is taken off in float32, whatever the file's type.
            gain: NDArray[np.float32] = blocks.to_float32(raw, kind).reshape(place.shape)
            return gain - np.float32(self.family.norm_offset)
        order = self._order(place)
        found = blocks.stored_floats(raw, kind) if kind in STORED else blocks.to_float32(raw, kind)
        found = found.reshape(place.shape)
        if self.family.delta_net and place.theirs.endswith(f".{delta_net.DECAY}"):
            found = delta_net.decay(found.astype(np.float32), place.theirs)
        if order is None:
            return found
        return found[:, order] if self._by_columns(place) else found[order]

    def coded(self, name: str) -> blocks.Coded | None:
        """Codes, scales and minima of a quantised tensor; None of one in floats. Raises ``UserError`` for scales that
        are no numbers."""
        place = self._find(name)
        if place.kind in STORED:
            return None
        if len(place.shape) != 2:
            raise UserError(f"expected a matrix in {place.theirs}, found the shape {list(place.shape)}")
        found = blocks.decode(place.raw(), place.kind)
        numbers = (found.scale,) if found.minimum is None else (found.scale, found.minimum)
        if not all(np.isfinite(n).all() for n in numbers):
            raise UserError(
                f"expected finite weights, found NaN or Inf scales in {place.theirs}; the file is damaged, copy it "
                "again"
            )
        order = self._order(place)
        if order is None:
            return found
        return found.columns(order) if self._by_columns(place) else found.rows(order)

    def bits(self, name: str) -> int | None:
        """Of a quantised tensor's codes, without reading them; None of one in floats."""
        kind = self._find(name).kind
        return None if kind in STORED else blocks.bits_of(kind)

    def scale_width(self, name: str) -> int | None:
        """How many numbers of a row share a scale, of a quantised tensor; None of one in floats."""
        place = self._find(name)
        if place.kind in STORED:
            return None
        row = blocks.decode(place.raw()[:1], place.kind)
        return row.codes.shape[1] // row.scale.shape[1]

    def identity(self) -> str:
        """Of the headers, the files' facts, and a page of every tensor."""
        from tulle.models.identity import add_file, page

        digest = hashlib.sha256()
        for file in self._files:
            digest.update(hashlib.sha256(file.header_bytes().data).digest())
            add_file(digest, file.path, [page(n, e.start, e.bytes) for n, e in file.tensors.items()])
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> Path:
        """A folder with ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and ``config.json``,
        made of the file's own data and kept in the user's cache."""
        header = hashlib.sha256(self._files[0].header_bytes().data).hexdigest()
        folder = cache.user_folder() / f"gguf-{TOKENIZER_VERSION}-{header[:32]}"
        if (folder / "tokenizer_config.json").is_file():
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        except OSError:
            partial = folder = Path(tempfile.mkdtemp(prefix="tulle-"))
        try:
            self._write_tokenizer(partial)
            if partial != folder:
                os.replace(partial, folder)
        except OSError:
            if not (folder / "tokenizer_config.json").is_file():  # another process has made it
                raise
            shutil.rmtree(partial, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return folder

    def _write_tokenizer(self, folder: Path) -> None:
        from tulle.models.gguf.tokenizer import tokenizer_of

        found = tokenizer_of(self.metadata)
        found.tokenizer.save(str(folder / "tokenizer.json"))
        ends = {key: value for key, value in self.config.items() if key.endswith("_token_id")}
        for name, content in (
            ("config.json", self.config), ("generation_config.json", ends), ("tokenizer_config.json", found.settings),
        ):  # fmt: skip
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _find(self, name: str) -> _Place:
        from tulle.models.source import missing

        try:
            return self._by_name[name]
        except KeyError:
            raise missing(name, self.path) from None

    def _by_columns(self, place: _Place) -> bool:
        """Whether it is columns that are put back."""
        return self.family.tiled and place.theirs.endswith(delta_net.OUTPUT)

    def _order(self, place: _Place) -> NDArray[np.int64] | None:
        """The order of a tensor's rows (or columns), where it is not the stored one."""
        theirs, shape = place.theirs, place.shape
        if self.family.delta_net:
            if not self.family.tiled:
                return None
            order = delta_net.order(theirs, self.config)
            wide = shape[1 if self._by_columns(place) else 0]
            if order is not None and len(order) != wide:
                raise UserError(f"expected {len(order)} channels in {theirs}, found {wide}; convert the file again")
            return order
        if not self.family.permuted or not names.is_permuted(theirs):
            return None
        key = "num_attention_heads" if "attn_q" in theirs else "num_key_value_heads"
        heads, head_dim = self.config[key], self.config["head_dim"]
        rows = shape[0] if shape else 1
        if rows != heads * head_dim or head_dim % 2:
            raise UserError(f"expected {heads} heads of {head_dim} channels in {theirs}, found {rows} rows")
        return names.restored_rows(heads, head_dim)


def _count(file: GgufFile, theirs: str, experts: Any, halves: bool = False) -> int:
    """Of the experts in a tensor of all. Raises ``UserError`` where they are not as many as the file says, or have no
    ``halves``."""
    shape = file.tensors[theirs].shape
    if len(shape) != (3 if theirs.endswith("weight") else 2) or (halves and shape[1] % 2):
        raise UserError(f"expected a tensor of all experts as {theirs}, found shape {list(shape)}")
    if shape[0] != experts:
        raise UserError(f"expected {experts} experts in {theirs}, found {shape[0]}; copy the file again")
    return shape[0]


def _numbers(metadata: Mapping[str, Any], family: Family, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Tensors of a number or two per layer that the file has among its metadata. Raises ``UserError`` where they are
    missing or no numbers."""
    if not family.per_layer:
        return {}
    found: dict[str, NDArray[np.float32]] = {}
    shapes = [(layer.prefix, layer.others()) for layer in describe(config).layers]
    for key, name in family.per_layer.items():
        value = metadata.get(key)
        if isinstance(value, float):
            value = np.full(len(shapes), value, np.float32)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or len(value) != len(shapes):
            raise UserError(f"expected {len(shapes)} numbers for {key} in the GGUF file, found {value!r:.80}")
        for (prefix, others), number in zip(shapes, value, strict=True):
            found[prefix + name] = np.full(others[name], number, np.float32)
    return found


def _parts(path: Path) -> list[Path]:
    """The files that belong together. Raises ``UserError`` where one is missing."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    if int(match[2]) != 1:
        raise UserError(f"expected the first of {int(match[3])} files, found {path.name}; give that of -00001-of-")
    parts = [path.with_name(f"{match[1]}-{n:05}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise UserError(f"expected {len(parts)} files beside {path.name}, found {absent[0]} missing; copy it too")
    return parts
