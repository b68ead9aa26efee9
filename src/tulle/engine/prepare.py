"""A checkpoint, packed or dense, as the engine's tensors: made once and kept in a file, which is memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import native
from tulle.core.paley import base_order, paley
from tulle.engine.files import TensorFile, write_tensors
from tulle.engine.layout import float_linear, integer_linear
from tulle.errors import UserError
from tulle.format.pack import STORAGE, bf16_to_f32, check_tensors, f32_to_bf16, unpack_linear_codes, unpack_mask
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.models.anatomy import anatomy

LAYOUT = 3
"""Of the file: another number, another file."""
HEADS = ("int8", "bf16", "as stored")
FOLDER = ".engine"
Progress = Callable[[str, int, int], None]


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


class Source:
    """The tensors of a checkpoint folder, mapped."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise UserError(f"expected *.safetensors in {folder}, found none; the checkpoint is incomplete")
        found = self.config.get("quantization_config")
        self.packed = None if found is None else QuantizationConfig.from_json(found)
        self.anatomy = anatomy(self.config)
        self._opened: dict[str, TensorFile] | None = None

    def identity(self) -> str:
        """Changes with the files."""
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return hashlib.sha256(json.dumps([self.config, stats], sort_keys=True).encode()).hexdigest()

    def __contains__(self, name: str) -> bool:
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

    def _by_name(self) -> dict[str, TensorFile]:
        if self._opened is None:
            self._opened = {name: opened for opened in map(TensorFile, self.files) for name in opened.names()}
        return self._opened


def prepared(
    folder: Path, head: str = "int8", progress: Progress | None = None
) -> tuple[Source, TensorFile, dict[str, Any]]:
    """The checkpoint, the engine's tensors, and the facts of every linear by name.

    They are kept in ``.engine`` beside the model, or in the user's cache where that cannot be written. Raises
    ``UserError`` for a checkpoint that is broken.
    """
    if head not in HEADS:
        raise UserError(f"expected a head of {', '.join(HEADS)}, found {head!r}")
    source = Source(folder)
    identity = f"{LAYOUT} {head} {source.identity()}"
    name = f"{head.replace(' ', '-')}.safetensors"
    places = (folder / FOLDER / name, _user_cache() / hashlib.sha256(identity.encode()).hexdigest() / name)
    for path in places:
        if path.exists():
            found = TensorFile(path)
            if found.metadata.get("identity") == identity:
                return source, found, json.loads(found.metadata["facts"])
    tensors, facts = convert(source, head, progress)
    metadata = {"identity": identity, "facts": json.dumps(facts)}
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors, metadata)
        except OSError:
            continue
        return source, TensorFile(path), facts
    raise UserError(
        f"expected room for the engine's copy of the weights in {places[0].parent} or {places[1].parent}, found "
        "neither "
        "can be written; free some space or set XDG_CACHE_HOME"
    )


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tulle"


def convert(
    source: Source, head: str, progress: Progress | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Every tensor that the engine reads by name, and the facts of every linear."""
    model = source.anatomy
    tensors: dict[str, NDArray[Any]] = {}
    facts: dict[str, Any] = {}
    specs = source.packed.linears if source.packed else {}
    names = [name for index in range(model.layers) for name in model.linears(index)]
    for number, name in enumerate(names):
        if progress:
            progress("convert", number, len(names))
        found, arrays = convert_linear(source, name, specs.get(name), model.linear_shape(name))
        facts[name] = found
        tensors |= {f"{name}.{suffix}": array for suffix, array in arrays.items()}
    head_name = model.architecture.embedding if model.tied else model.architecture.head
    found, arrays = convert_head(source, head_name, (model.vocabulary, model.hidden), head)
    facts["head"] = found
    tensors |= {f"head.{suffix}": array for suffix, array in arrays.items()}
    return tensors, facts


def convert_linear(
    source: Source, name: str, spec: LinearSpec | None, shape: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(facts, arrays) of one linear."""
    if spec is None:
        weight = source.tensor(f"{name}.weight", shape)
        return float_linear(_engine_float(weight, source.dtype(f"{name}.weight")), None)
    if spec.shape != shape:
        raise UserError(f"expected {name} of shape {list(shape)}, found {list(spec.shape)} in quantization_config")
    arrays = {suffix: _as_stored(source, f"{name}.{suffix}", kind) for suffix, (kind, _) in spec.tensors().items()}
    if spec.bits is None:
        check_tensors(spec, arrays)
        mask = unpack_mask(arrays["mask"], shape[1]) if spec.sparse else None
        dense = native.expand(arrays["mask"], arrays["values"], shape[1]) if spec.sparse else arrays["weight"]
        return float_linear(_engine_float(dense, "BF16" if spec.values_dtype == "bfloat16" else "F16"), mask)
    codes, mask = unpack_linear_codes(spec, arrays)
    return integer_linear(spec.bits, codes, arrays["scale"], arrays.get("zero_point"), mask)


def convert_head(
    source: Source, name: str, shape: tuple[int, int], head: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The output head: int8 with a scale per 32 inputs, or in floats."""
    stored = source.tensor(name, shape)
    kind = source.dtype(name)
    if head == "as stored":
        return float_linear(_engine_float(stored, kind), None)
    weight = source.floats(name, shape)
    if head == "bf16":
        return float_linear(f32_to_bf16(weight), None)
    width = next((n for n in (32, 16, 8) if shape[1] % n == 0), shape[1])
    groups = weight.reshape(shape[0], -1, width)
    scale = f32_to_bf16(np.abs(groups).max(axis=2) / 127)
    step = bf16_to_f32(scale)
    whole = np.rint(groups / np.where(step > 0, step, 1)[:, :, None]).clip(-127, 127)
    return integer_linear(8, (whole + 128).astype(np.uint8).reshape(shape), scale, None, None)


def _engine_float(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """Bits of bfloat16 as they are, everything else in float32."""
    return values if kind == "BF16" else values.astype(np.float32)


def _as_stored(source: Source, name: str, kind: str) -> NDArray[Any]:
    found = source.tensor(name)
    if found.dtype != np.dtype(STORAGE.get(kind, kind)):
        raise UserError(f"expected {name} in {kind}, found {source.dtype(name)}")
    return found


def transform_facts(spec: LinearSpec, source: Source, name: str) -> list[dict[str, Any]]:
    """The transforms in front of a linear as the native engine takes them; ``name`` holds their tensors."""
    return [
        transform(t.to_json(), spec.shape[1], {
            suffix: source.tensor(f"{name}.transform.{number}.{suffix}", shape)
            for suffix, (_, shape) in t.tensors(spec.shape[1]).items()
        })
        for number, t in enumerate(spec.transform)
    ]  # fmt: skip


def transform(spec: Mapping[str, Any], channels: int, tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """One transform: its sizes and numbers, in float32."""
    found: dict[str, Any] = {"kind": spec["kind"], "channels": channels}
    numbers = {suffix: t.astype(np.float32) for suffix, t in tensors.items() if t.dtype != np.int32}
    if spec["kind"] == "diagonal":
        return found | {"scale": numbers["scale"].reshape(-1)}
    if spec["kind"] == "permutation":
        return found | {"index": np.ascontiguousarray(tensors["index"])}
    if spec["kind"] == "block_matrix":
        return found | {"block": spec["block"], "shared": spec["shared"], "matrix": numbers["matrix"].reshape(-1)}
    if spec["kind"] == "kronecker":
        left = np.ascontiguousarray(numbers["left"].T).reshape(-1)
        return found | {
            "left_size": spec["left"], "right_size": spec["right"], "left": left, "right": numbers["right"].reshape(-1),
        }  # fmt: skip
    return found | hadamard(spec["block"])


def hadamard(block: int) -> dict[str, Any]:
    """Block, base order m and H_mᵀ of a Hadamard transform."""
    base = base_order(block)
    if base is None:
        raise UserError(f"expected a Hadamard order, found a block of {block} channels; the file is broken")
    facts: dict[str, Any] = {"block": block, "base": base}
    if base > 1:
        facts["matrix"] = np.ascontiguousarray(paley(base).T.astype(np.float32)).reshape(-1)
    return facts
