"""A checkpoint, packed or dense, as the engine's tensors: made once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import native
from tulle.engine.files import TensorFile, TensorWriter
from tulle.engine.layout import LINE_OUTPUTS, columns_kind, float_linear, integer_linear
from tulle.errors import UserError
from tulle.format.pack import STORAGE, bf16_to_f32, check_tensors, f32_to_bf16, unpack_linear_codes, unpack_mask
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.models.anatomy import anatomy

LAYOUT = 10
"""Of the file: another number, another file."""
HEADS = ("int8", "int4", "bf16", "as stored")
FOLDER = ".engine"
FACTS = {
    "kind": str, "sparse": bool, "by_columns": bool, "fours": bool, "rows": int, "columns": int, "segment": int,
    "segments": int, "segments_per_scale": int, "zero": int,
}  # fmt: skip
"""Of a linear, with their types."""
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

    def _by_name(self) -> dict[str, TensorFile]:
        if self._opened is None:
            self._opened = {name: opened for opened in map(TensorFile, self.files) for name in opened.names()}
        return self._opened


class Source(Checkpoint):
    """A checkpoint of an architecture that anatomy knows."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        found = self.config.get("quantization_config")
        self.packed = None if found is None else QuantizationConfig.from_json(found)
        self.anatomy = anatomy(self.config)

    def embedding_name(self) -> str:
        """The embedding's name in the files."""
        return self.anatomy.embedding_name(self)

    def head_name(self) -> str:
        """The output head's name in the files."""
        return self.embedding_name() if self.anatomy.tied else self.anatomy.architecture.head


def prepared(
    source: Source, head: str, layout: str, progress: Progress | None = None
) -> tuple[TensorFile, dict[str, Any]]:
    """The engine's tensors, and the facts of every linear by name; ``layout``: one of choose.LAYOUTS but auto.

    They are kept in ``.engine`` beside the model, or in the user's cache where that cannot be written. Raises
    ``UserError`` for a checkpoint that is broken.
    """
    identity = f"{LAYOUT} {head} {layout} {source.identity()}"
    wanted = {*(names[0] for names in together(source, layout)), "head"}
    for folder in cache_folders(source):
        path = folder / f"{head} {layout}.safetensors".replace(" ", "-")
        known = _known(path, identity, wanted) if path.exists() else None
        if known:
            return known
    failure = ""
    for folder in cache_folders(source):
        path = folder / f"{head} {layout}.safetensors".replace(" ", "-")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TensorWriter(path, 8192 + 2048 * len(wanted)) as file:
                facts = {}
                for name, found_facts, arrays in convert(source, head, layout, progress):
                    facts[name] = found_facts
                    for suffix, array in arrays.items():
                        file.add(f"{name}.{suffix}", array)
                file.finish({"identity": identity, "facts": json.dumps(facts)})
        except OSError as error:
            failure = f"{folder} ({error.strerror})"
            continue
        return TensorFile(path, resident=True), facts
    raise UserError(
        f"expected room for the engine's copy of the weights beside the model or in the user's cache, found {failure}; "
        "free some space or set XDG_CACHE_HOME"
    )


def _known(path: Path, identity: str, names: set[str]) -> tuple[TensorFile, dict[str, Any]] | None:
    """A file that was made earlier; None where it is of another model or broken, so that it is made again."""
    try:
        found = TensorFile(path, resident=True)
        facts = json.loads(found.metadata.get("facts", ""))
    except (UserError, ValueError):
        return None
    if found.metadata.get("identity") != identity or not isinstance(facts, dict) or set(facts) != names:
        return None
    whole = all(isinstance(f, dict) and {k: type(v) for k, v in f.items()} == FACTS for f in facts.values())
    return (found, facts) if whole else None


def cache_folders(source: Source) -> tuple[Path, Path]:
    """Where what is made of a model may be kept."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tulle"
    return source.folder / FOLDER, user / hashlib.sha256(str(source.folder.resolve()).encode()).hexdigest()[:32]


def together(source: Source, layout: str, blocks: Iterable[int] | None = None) -> list[tuple[str, ...]]:
    """Linears by name, of all blocks or these; those that stand in one together. By columns that is what sees the same
    inputs (q, k and v; gate and up), so that what an input meets is one long piece of memory."""
    found: list[tuple[str, ...]] = []
    for index in range(source.anatomy.layers) if blocks is None else blocks:
        for row in source.anatomy.rows:
            names = tuple(source.anatomy.block_prefix(index) + name for name in row.linears)
            found += [names] if _one(source, layout, names) else [(name,) for name in names]
    return found


def _one(source: Source, layout: str, names: tuple[str, ...]) -> bool:
    specs = [source.packed.linears.get(name) if source.packed else None for name in names]
    first = specs[0]
    inputs = 0 if first is None else _column_inputs(first, layout)
    if first is None or inputs == 0:
        return False
    stays_sparse = first.sparse and "dense" not in layout
    if stays_sparse and inputs == 1:
        return False  # longer pieces gain nothing there
    if first.input_sparsity is not None and first.input_sparsity.weighted:
        return False  # scores may differ

    def same(spec: LinearSpec) -> dict[str, Any]:
        """What has to be the same."""
        own = {"shape", "nonzeros", "pattern", "transform", "transform_of"}
        return {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in own}

    if any(spec is None or same(spec) != same(first) for spec in specs):
        return False
    line = LINE_OUTPUTS[columns_kind(first.bits or 0, stays_sparse)]
    return all(source.anatomy.linear_shape(name)[0] % line == 0 for name in names[:-1])


def _column_inputs(spec: LinearSpec, layout: str) -> int:
    """Inputs of a column, where there are kernels by columns for it and they are asked for; else 0."""
    if "columns" not in layout or spec.bits is None or (spec.sparse and spec.bits > 4 and "dense" not in layout):
        return 0
    selection = spec.input_sparsity
    fours = selection is not None and selection.kind == "top_k" and selection.unit % 4 == 0
    # Fours must not lie across the inputs of two scales, which are padded apart.
    width = spec.shape[1] if spec.group_size is None else spec.group_size
    return 4 if fours and width % 4 == 0 else 1


def convert(
    source: Source, head: str, layout: str, progress: Progress | None = None
) -> Iterator[tuple[str, dict[str, Any], dict[str, NDArray[Any]]]]:
    """(name, facts, arrays) of every linear and of the head; those that stand together have the first one's name."""
    parts = together(source, layout)
    for number, names in enumerate(parts):
        if progress:
            progress("convert", number, len(parts))
        yield names[0], *convert_linears(source, names, layout)
    yield "head", *convert_head(source, head)


def convert_linears(
    source: Source, names: tuple[str, ...], layout: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(facts, arrays) of linears that stand together. Pruned weights are stored too where the layout is dense; what has
    no kernels by columns stands in tiles."""
    fill = "dense" in layout
    parts = []
    for name in names:
        shape = source.anatomy.linear_shape(name)
        spec = source.packed.linears.get(name) if source.packed else None
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
            kind = "BF16" if spec.values_dtype == "bfloat16" else "F16"
            return float_linear(_engine_float(dense, kind), None if fill else mask)
        codes, mask = unpack_linear_codes(spec, arrays)
        if fill and mask is not None:
            # A pruned weight is the code of its zero point.
            middle = np.full((shape[0], 1), 1 << (spec.bits - 1), np.uint8)
            zero = arrays.get("zero_point", middle)
            codes, mask = np.where(mask, codes, zero.repeat(shape[1] // zero.shape[1], axis=1)), None
        parts.append((codes, arrays["scale"], arrays.get("zero_point"), mask))
    assert spec is not None and spec.bits is not None

    def one(place: int) -> Any:
        """The parts' arrays, one's rows behind another's."""
        arrays: list[Any] = [part[place] for part in parts]
        return arrays[0] if len(arrays) == 1 or arrays[0] is None else np.concatenate(arrays)

    return integer_linear(spec.bits, one(0), one(1), one(2), one(3), _column_inputs(spec, layout))


def convert_head(source: Source, head: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The output head: int8 or int4 with a scale per 32 inputs, or in floats. The number of largest magnitude of 32 is
    the lowest 4-bit code, so that all sixteen are used."""
    model = source.anatomy
    name = source.head_name()
    shape = (model.vocabulary, model.hidden)
    stored = source.tensor(name, shape)
    kind = source.dtype(name)
    if head == "as stored":
        return float_linear(_engine_float(stored, kind), None)
    weight = source.floats(name, shape)
    if head == "bf16":
        return float_linear(f32_to_bf16(weight), None)
    width = next((n for n in (32, 16, 8) if shape[1] % n == 0), shape[1])
    groups = weight.reshape(shape[0], -1, width)
    most = np.abs(groups).max(axis=2)
    if not np.isfinite(most).all():
        raise UserError(f"expected finite numbers in {name}, found others; the checkpoint is broken")
    if head == "int4":
        bits, least, largest = 4, -8, 7
        outermost = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        scale = f32_to_bf16(outermost / np.float32(least))
    else:
        bits, least, largest = 8, -127, 127
        scale = f32_to_bf16(most / largest)
    step = bf16_to_f32(scale)
    whole = np.rint(groups / np.where(step == 0, 1, step)[:, :, None]).clip(least, largest)
    return integer_linear(bits, (whole + (1 << (bits - 1))).astype(np.uint8).reshape(shape), scale, None, None)


def _engine_float(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """Bits of bfloat16 as they are, everything else in float32."""
    return values if kind == "BF16" else values.astype(np.float32)


def _as_stored(source: Source, name: str, kind: str) -> NDArray[Any]:
    found = source.tensor(name)
    if found.dtype != np.dtype(STORAGE.get(kind, kind)):
        raise UserError(f"expected {name} in {kind}, found {source.dtype(name)}")
    return found
