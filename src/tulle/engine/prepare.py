"""The engine's tensors of a model: made once, kept in a file, and mapped from it the next time.

checkpoint ─ read linears ─► StoredLinear ─ densify, fuse ─► StoredLinear ─ layout.for_kernels ─► facts, arrays
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import cache
from tulle.engine.checkpoint import Source, StoredLinear, kernel_bits
from tulle.engine.files import TensorWriter, resident
from tulle.engine.latent import absorbed
from tulle.engine.layout import LINE_OUTPUTS, ModelLayout, for_kernels, input_major_kind
from tulle.engine.native_model import LinearFacts
from tulle.errors import UserError
from tulle.format.pack import bf16_to_f32, f32_to_bf16
from tulle.format.spec import LinearSpec
from tulle.models.tensor_file import TensorFile

LAYOUT = 13
"""Of the file: another number, another file."""
HEADS = ("int8", "int4", "bf16", "as stored")
EMBEDDING, HEAD, EXACT_HEAD = "embedding", "head", "exact_head"
LAYER_INPUTS, LAYER_TABLE = "layer_inputs", "layer_table"
"""Names of the outer tables in the engine's file, and of the linear and the table that give layers inputs of their own;
all but the head only where :func:`tables` lists them."""
Progress = Callable[[str, int, int], None]
Packed = tuple[str, LinearFacts, dict[str, NDArray[Any]]]
"""Name, facts and arrays of linears that are fused (under the first one's name), or of an outer table."""


def prepared(
    source: Source, head: str, layout: ModelLayout, progress: Progress | None = None
) -> tuple[TensorFile, dict[str, LinearFacts]]:
    """The engine's tensors, and the facts of every linear by name.

    They are kept in ``.engine`` beside the model, or in the user's cache where that cannot be written. Raises
    ``UserError`` for a checkpoint that is broken.
    """
    identity = f"{LAYOUT} {head} {layout} {source.identity()}"
    names = {
        *(fused[0] for fused in fused_linears(source, layout)),
        *(part for name in absorbed_linears(source) for part in absorbed_names(name)),
        *tables(source, head),
    }
    paths = [folder / f"{head} {layout}.safetensors".replace(" ", "-") for folder in cache_folders(source)]
    for path in paths:
        known = _known(path, identity, names) if path.exists() else None
        if known:
            return known
    failure = ""
    source.require_finite()
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _written(path, identity, len(names), convert(source, head, layout, progress=progress))
        except OSError as error:
            failure = f"{path.parent} ({error.strerror})"
    raise UserError(
        f"expected room for the engine's copy of the weights beside the model or in the user's cache, found {failure}; "
        "free some space or set XDG_CACHE_HOME"
    )


def _known(path: Path, identity: str, names: set[str]) -> tuple[TensorFile, dict[str, LinearFacts]] | None:
    """A file that was made earlier; None where it is of another model or broken, so that it is made again."""
    try:
        found = resident(path)
        stored = json.loads(found.metadata.get("facts", ""))
    except (UserError, ValueError):
        return None
    if found.metadata.get("identity") != identity or not isinstance(stored, dict) or set(stored) != names:
        return None
    facts = {name: known for name, one in stored.items() if (known := LinearFacts.from_json(one)) is not None}
    return (found, facts) if len(facts) == len(names) else None


def _written(
    path: Path, identity: str, count: int, linears: Iterable[Packed]
) -> tuple[TensorFile, dict[str, LinearFacts]]:
    facts = {}
    with TensorWriter(path, 8192 + 2048 * count) as file:
        for name, found, arrays in linears:
            facts[name] = found
            for suffix, array in arrays.items():
                file.add(f"{name}.{suffix}", array)
        stored = {name: found.to_json() for name, found in facts.items()}
        file.finish({"identity": identity, "facts": json.dumps(stored)})
    return resident(path), facts


def cache_folders(source: Source) -> tuple[Path, Path]:
    """Where what is made of a model may be kept."""
    path = source.path
    beside = path / cache.FOLDER if path.is_dir() else path.with_name(path.name + cache.FOLDER)
    return beside, cache.user_folder() / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]


def convert(
    source: Source,
    head: str,
    layout: ModelLayout,
    blocks: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Packed]:
    """The linears of all blocks or of these, then the outer tables."""
    linears, latent, outer = (
        fused_linears(source, layout, blocks),
        absorbed_linears(source, blocks),
        tables(source, head),
    )
    done, count = 0, len(linears) + len(latent) + len(outer)

    def tell() -> None:
        nonlocal done
        if progress:
            progress("convert", done, count)
        done += 1

    for names in linears:
        tell()
        block_inputs = _block_inputs(source.specs.get(names[0]), layout)
        yield names[0], *for_kernels(_read(source, names, layout), block_inputs)
    for name in latent:
        tell()
        found = absorbed(_read(source, (name,), layout), source.absorbed[name])
        keys, values = absorbed_names(name)
        facts, arrays = for_kernels(found.keys)
        yield keys, facts, arrays if found.factors is None else arrays | {"factors": found.factors}
        yield values, *for_kernels(found.values)
    for name in outer:
        tell()
        yield name, *for_kernels(_table(source, name, head))


def absorbed_linears(source: Source, blocks: Iterable[int] | None = None) -> list[str]:
    """Linears of latent attention that give way to two others (:func:`absorbed_names`), of all blocks or of these."""
    chosen = range(len(source.groups)) if blocks is None else blocks
    return [names[0] for index in chosen for names in source.groups[index] if names[0] in source.absorbed]


def absorbed_names(name: str) -> tuple[str, str]:
    """Of what is made of such a linear for keys and for values."""
    return f"{name}.keys", f"{name}.values"


def fused_linears(source: Source, layout: ModelLayout, blocks: Iterable[int] | None = None) -> list[tuple[str, ...]]:
    """Linears by name, of all blocks or of these; those that become one together.

    Input-major ones that see the same inputs do (q, k and v; gate and up), so that what an input is multiplied with is
    one long run of memory.
    """
    found: list[tuple[str, ...]] = []
    for index in range(len(source.groups)) if blocks is None else blocks:
        for names in source.groups[index]:
            if names[0] in source.absorbed:
                continue
            found += [names] if _fuse(source, layout, names) else [(name,) for name in names]
    return found


def _fuse(source: Source, layout: ModelLayout, names: tuple[str, ...]) -> bool:
    specs = [source.specs.get(name) for name in names]
    first = specs[0]
    inputs = _block_inputs(first, layout)
    if first is None or inputs == 0:
        return False
    stays_sparse = first.sparse and not layout.densified
    if stays_sparse and inputs == 1:
        return False  # longer runs gain nothing there
    if first.input_sparsity is not None and first.input_sparsity.weighted:
        return False  # scores may differ

    def compared(spec: LinearSpec) -> dict[str, Any]:
        own = {"shape", "nonzeros", "pattern", "transform", "transform_of"}
        return {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in own}

    if any(spec is None or compared(spec) != compared(first) for spec in specs):
        return False
    line = LINE_OUTPUTS[input_major_kind(kernel_bits(first) or 0, stays_sparse)]
    return all(source.shapes[name][0] % line == 0 for name in names[:-1])


def _block_inputs(spec: LinearSpec | None, layout: ModelLayout) -> int:
    """Inputs of a block of an input-major layout (1 or 4), where it is asked for and has kernels; else 0: tiles."""
    bits = None if spec is None else kernel_bits(spec)
    if spec is None or not layout.input_major or bits is None:
        return 0
    if spec.sparse and bits > 4 and not layout.densified:
        return 0
    selection = spec.input_sparsity
    blocks4 = selection is not None and selection.kind == "top_k" and selection.unit % 4 == 0
    # Blocks of 4 must not lie across the inputs of two scales, which are padded apart.
    width = spec.shape[1] if spec.group_size is None else spec.group_size
    return 4 if blocks4 and width % 4 == 0 else 1


def _read(source: Source, names: tuple[str, ...], layout: ModelLayout) -> StoredLinear:
    """Linears that become one, the rows of one behind another's; densified where the layout is dense."""
    parts = [source.linear(name) for name in names]
    parts = [
        part if (order := source.row_orders.get(name)) is None else part.with_rows(order)
        for name, part in zip(names, parts, strict=True)
    ]
    if layout.densified:
        parts = [_densified(part) for part in parts]
    if len(parts) == 1:
        return parts[0]
    parts = [part.with_whole_scales() for part in parts]
    scales = [part.scale for part in parts if part.scale is not None]
    masks = [part.mask for part in parts if part.mask is not None]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return StoredLinear(
        np.concatenate([part.values for part in parts]),
        np.concatenate(masks) if masks else None,
        parts[0].bits,
        np.concatenate(scales),
        np.concatenate(zeros) if zeros else None,
        zero=parts[0].zero,
    )


def _densified(part: StoredLinear) -> StoredLinear:
    """Without its mask: a pruned weight is 0, or the code of its zero point."""
    if part.mask is None or part.bits is None:
        return replace(part, mask=None)
    middle = np.full((len(part.values), 1), 1 << (part.bits - 1) if part.zero is None else part.zero, np.uint8)
    zero = middle if part.zero_point is None else part.zero_point
    wide = zero.repeat(part.values.shape[1] // zero.shape[1], axis=1)
    return replace(part, values=np.where(part.mask, part.values, wide), mask=None)


def tables(source: Source, head: str) -> list[str]:
    """The outer tables that the kernels need: the head; the embedding where it is stored in codes, unless it is the
    same codes; a head in codes of which a rougher one is asked for; what gives layers inputs of their own."""
    kept, tied = head_as_coded(source, head), source.description.tied
    coded = [source.coded_bits(name) is not None for name in (source.embedding_name(), source.head_name())]
    found = [HEAD]
    if coded[0] and not (tied and kept):
        found.append(EMBEDDING)
    if coded[1] and not kept and not tied:
        found.append(EXACT_HEAD)
    own = source.description.per_layer
    if own is None:
        return found
    return [*found, LAYER_INPUTS, LAYER_TABLE] if layer_table_as_coded(source) else [*found, LAYER_INPUTS]


def layer_table_as_coded(source: Source) -> bool:
    """Whether the table of layers' own inputs is stored in codes whose scales lie within a layer's part."""
    own = source.description.per_layer
    width = None if own is None else source.scale_width(own.table)
    return own is not None and width is not None and own.width % width == 0


def head_as_coded(source: Source, head: str) -> bool:
    """Whether the head is stored in codes, and these are what is run: always, unless 4 bits are asked for and it has
    more. Other tables than it would be no finer."""
    bits = source.coded_bits(source.head_name())
    return bits is not None and (head != "int4" or bits <= 4)


def _table(source: Source, name: str, head: str) -> StoredLinear:
    if name == HEAD:
        return quantised_head(source, head)
    if name in (LAYER_INPUTS, LAYER_TABLE):
        return _layer_input(source, name)
    stored = source.embedding_name() if name == EMBEDDING else source.head_name()
    found = source.coded(stored, (source.description.vocabulary, source.description.hidden))
    assert found is not None  # tables() lists those in codes
    return found


def _layer_input(source: Source, name: str) -> StoredLinear:
    """The linear that gives layers inputs of their own; the table, a row for every token and layer."""
    own, model = source.description.per_layer, source.description
    assert own is not None
    shapes = own.tensors(len(model.layers), model.hidden)
    if name == LAYER_INPUTS:
        return StoredLinear(source.kernel_floats(own.projection, shapes[own.projection]))
    rows, columns = shapes[own.table]
    table = source.coded(own.table, (rows, columns))
    assert table is not None  # tables() lists one in codes
    return table.with_width(own.width)


def quantised_head(source: Source, head: str) -> StoredLinear:
    """The output head: int8 or int4 with a scale per 32 inputs, in floats, or in the codes that it is stored in
    (:func:`head_as_coded`). Of 4 bits, the number of largest magnitude of 32 is the lowest code, so that all sixteen
    are used."""
    name = source.head_name()
    shape = (source.description.vocabulary, source.description.hidden)
    coded = source.coded(name, shape) if source.coded_bits(name) is not None else None
    if coded is not None and head_as_coded(source, head):
        return coded
    if head == "as stored":
        return StoredLinear(source.kernel_floats(name, shape))
    weight = source.floats(name, shape) if coded is None else coded.floats()
    if head == "bf16":
        return StoredLinear(f32_to_bf16(weight))
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
    return StoredLinear((whole + (1 << (bits - 1))).astype(np.uint8).reshape(shape), None, bits, scale, None)
