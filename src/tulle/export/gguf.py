"""Export to GGUF, the file that llama.cpp reads: every tensor in the smallest type that loses nothing.

A quantised linear w = s·(u − z), pruned weights at u = z, is whole numbers q = u − z times scales. Where a scale holds
for blocks of 32 (of 256: TQ2_0) and half precision holds it exactly, q decides: TQ2_0 for −1…2, Q4_0 for −8…7, Q4_1 for
codes of 4 bits whose −s·z half precision holds too, Q5_0, Q8_0. MXFP4 is MXFP4. Everything else is written as floats:
bfloat16 or half precision where they hold every value, else float32. So is NVFP4, since GGUF's has no scale of the
tensor. Norms and biases are float32, as llama.cpp wants them.

Nothing is rounded. What GGUF cannot say (quantised inputs, choices among inputs, quantised keys and values) is left
out, and the notes say so. Transforms are multiplied back into the weights.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.export.dense import unpacked_weight
from tulle.export.gguf_metadata import add_key, metadata_of, require_same, stored_names, tensors_of
from tulle.export.gguf_tokenizer import write_tokenizer
from tulle.format.pack import bf16_to_f32, f32_to_bf16, unpack_scale, unpack_stored, unpack_zero_point
from tulle.format.spec import LinearSpec
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import Decoder
from tulle.models.gguf import blocks, names
from tulle.models.gguf.families import Family
from tulle.models.gguf.source import GgufSource
from tulle.models.source import describe_source
from tulle.models.tensor_file import as_float32

Type = GGMLQuantizationType
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q4_0: 2, Type.Q4_1: 3, Type.Q8_0: 7, Type.Q5_0: 8, Type.BF16: 32,
              Type.TQ2_0: 37, Type.MXFP4: 38}  # fmt: skip
"""``general.file_type``, by the type of most weights."""
FLOATS = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class Stored:
    """A tensor as GGUF stores it."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    """``[..., bytes of a row]``"""

    def floats(self) -> NDArray[np.float32]:
        return blocks.to_float32(self.data, self.kind).reshape(self.shape)


@dataclass
class Written:
    """What was written."""

    types: dict[str, str] = field(default_factory=dict)
    """GGUF's name of a tensor → its type."""
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


def write(checkpoint: Checkpoint, file: Path, progress: Callable[[int, int], None] | None = None) -> Written:
    """Writes a checkpoint, packed or dense, as one GGUF file; memory is one tensor.

    Raises ``UserError`` for a family or a feature that GGUF files of that family cannot say.
    """
    model = checkpoint.describe()
    metadata = metadata_of(model)
    family = metadata.family
    found = Written(notes=metadata.notes)
    packed = checkpoint.packed
    linears = dict(packed.linears) if packed else {}
    _note_what_is_lost(checkpoint, linears, found.notes)
    stored_as = stored_names(model, family)
    for key, name in family.per_layer.items():
        every = [_values(checkpoint, linears, model, layer.prefix + name) for layer in model.layers]
        metadata.keys[key] = [float(values.reshape(-1)[0]) for values in every]
    parts: dict[str, list[str]] = {}
    for name, theirs in stored_as.items():
        parts.setdefault(theirs, []).append(name)

    def made(of: list[str]) -> Stored:
        if family.tensors.stack(of[0]) is None:
            return _stored(checkpoint, linears, model, family, of[0])
        return _stacked(checkpoint, linears, model, of)

    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, family.architecture)
    try:
        writer.add_name(checkpoint.path.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.keys.items():
            add_key(writer, key, value)
        write_tokenizer(writer, checkpoint, model.vocabulary, found.notes)
        # Headers come first: types depend on values, so that tensors are made twice.
        unheld: list[str] = []
        for done, (theirs, of) in enumerate(parts.items()):
            stored = made(of)
            writer.add_tensor_info(theirs, stored.data.shape, np.dtype(np.uint8), stored.data.nbytes, stored.kind)
            found.types[theirs] = stored.kind.name
            found.bytes += stored.data.nbytes
            spec = linears.get(of[0].removesuffix(".weight"))
            if spec is not None and spec.bits is not None and stored.kind in FLOATS:
                unheld += [stored.kind.name] * len(of)
            if progress:
                progress(done, 2 * len(parts))
        if unheld:
            kinds = " or ".join(sorted(set(unheld)))
            found.notes.append(
                f"{len(unheld)} quantised weights are written as {kinds}: no type of GGUF holds their codes and scales "
                "exactly (scales of 8 bits, for one)"
            )
        for theirs, factors in metadata.factors.items():
            writer.add_tensor_info(theirs, factors.shape, factors.dtype, factors.nbytes, Type.F32)
        matrices = Counter(found.types[stored_as[f"{name}.weight"]] for name in _linear_names(model))
        ((most, _),) = matrices.most_common(1)
        writer.add_file_type(FILE_TYPES[next(kind for kind in FILE_TYPES if kind.name == most)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, of in enumerate(parts.values()):
            writer.write_tensor_data(made(of).data)
            if progress:
                progress(len(parts) + done + 1, 2 * len(parts))
        for factors in metadata.factors.values():
            writer.write_tensor_data(factors)
        writer.close()
        os.replace(partial, file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return found


def check(checkpoint: Checkpoint, file: Path) -> int:
    """Reads the file back and compares: its description with the checkpoint's, and every tensor value for value.
    Returns how many tensors; raises ``UserError`` where one differs."""
    source = GgufSource(file)
    model = checkpoint.describe()
    require_same(model, describe_source(source), source.family.architecture)
    packed = checkpoint.packed
    linears = dict(packed.linears) if packed else {}
    wanted = tensors_of(model)
    for name in wanted:
        values = as_float32(source.read(name), source.info(name).dtype)
        expected = _values(checkpoint, linears, model, name)
        if source.family.has_offset(str(source.family.tensors.theirs(name))):
            # The sum with the offset is rounded.
            same = np.allclose(expected, values, rtol=0, atol=2.0**-22 * max(1.0, float(np.abs(expected).max())))
        else:
            same = np.array_equal(expected, values)
        if not same:
            raise UserError(f"expected {name} of the GGUF file as it was, found other values; please report the recipe")
    return len(wanted)


def _linear_names(model: Decoder) -> list[str]:
    return [name for layer in model.layers for name in model.linear_names(layer.index)]


def _note_what_is_lost(checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], notes: list[str]) -> None:
    specs = linears.values()
    if any(spec.input_bits for spec in specs):
        notes.append("GGUF cannot say that inputs are quantised: they are not in the export")
    if any(spec.input_sparsity for spec in specs):
        notes.append("GGUF cannot say which inputs a token keeps: all of them are read in the export")
    if any(spec.transform for spec in specs):
        notes.append("transforms of inputs are multiplied back into the weights")
    if checkpoint.packed and checkpoint.packed.attention:
        notes.append("GGUF cannot say that keys and values are quantised: they are not in the export")


def _stored(
    checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], model: Decoder, family: Family, name: str
) -> Stored:
    """A tensor in the smallest type that loses nothing, its rows in llama.cpp's order."""
    linear = name.removesuffix(".weight")
    found = None
    if linear in linears:
        found = _coded(checkpoint, linear, linears[linear])
    if found is None:
        found = _floats(_values(checkpoint, linears, model, name))
    theirs = str(family.tensors.theirs(name))
    if family.has_offset(theirs):
        found = _floats(found.floats() + np.float32(family.norm_offset))
    if family.permuted and names.is_permuted(theirs):
        mixer = model.layers[0].attention
        order = names.stored_rows(mixer.heads if "attn_q" in theirs else mixer.kv_heads, mixer.head_dim)
        rows = _in_rows(found)[order]
        found = Stored(found.kind, found.shape, rows if len(found.shape) > 1 else rows.reshape(-1))
    return found


def _stacked(checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], model: Decoder, experts: list[str]) -> Stored:
    """The tensors of all experts in one, in the smallest type that loses nothing of any."""

    def coded(name: str, only: GGMLQuantizationType | None = None) -> Stored | None:
        linear = name.removesuffix(".weight")
        return _coded(checkpoint, linear, linears[linear], only) if linear in linears else None

    found = [coded(name) for name in experts]
    kinds = {one.kind if one is not None else None for one in found}
    for kind in blocks.RANGES if len(kinds) > 1 and None not in kinds else ():
        found = [coded(name, kind) for name in experts]
        if all(one is not None for one in found):
            kinds = {kind}
            break
    if len(kinds) > 1 or None in kinds:
        return _floats(np.stack([_values(checkpoint, linears, model, name) for name in experts]))
    held = [one for one in found if one is not None]
    return Stored(held[0].kind, (len(held), *held[0].shape), np.stack([one.data for one in held]))


def _in_rows(stored: Stored) -> NDArray[np.uint8]:
    """Bytes by row; of a vector, by number."""
    return stored.data if len(stored.shape) > 1 else stored.data.reshape(stored.shape[0], -1)


def _values(
    checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], model: Decoder, name: str
) -> NDArray[np.float32]:
    """What a tensor is, in float32."""
    linear = name.removesuffix(".weight")
    if linear in linears and name != linear:
        spec = linears[linear]
        tensors = checkpoint.read_many(f"{linear}.{suffix}" for suffix in spec.tensors())
        by_suffix = {key.removeprefix(f"{linear}."): tensor for key, tensor in tensors.items()}
        return np.asarray(unpacked_weight(checkpoint, linear, spec, by_suffix).float().numpy())
    stored = model.embedding_name(checkpoint) if name == model.embedding else name
    return as_float32(checkpoint.source.read(stored), checkpoint.source.info(stored).dtype)


def _coded(
    checkpoint: Checkpoint, linear: str, spec: LinearSpec, only: GGMLQuantizationType | None = None
) -> Stored | None:
    """A quantised linear in the first type, or in the one of whole numbers that is asked for, that holds it exactly;
    None where there is none."""
    if spec.bits is None or spec.transform:
        return None
    arrays = {suffix: np.asarray(checkpoint.source.read(f"{linear}.{suffix}")) for suffix in spec.tensors()}
    codes, mask = unpack_stored(spec, arrays)
    rows, columns = spec.shape
    if spec.format == "mxfp4":
        return Stored(Type.MXFP4, spec.shape, blocks.encode_mxfp4(codes, arrays["scale"]))
    if spec.format != "int":
        return None
    width = columns // spec.groups
    zero = np.full((rows, spec.groups), 1 << (spec.bits - 1), np.int16)
    zero_point = unpack_zero_point(spec, arrays)
    if zero_point is not None:
        zero = zero_point.astype(np.int16)
    wide = zero.repeat(width, axis=1)
    whole = codes.astype(np.int16) - wide
    if mask is not None:
        whole[~mask] = 0
    # Where all weights of a scale are 0, whatever it is (some quantisers write the least number there) is 0, too.
    zeros_alone = (whole.reshape(rows, spec.groups, width) == 0).all(axis=2)
    numbers = np.where(zeros_alone, np.float32(0), unpack_scale(spec, arrays))
    scale = _half(numbers)
    if scale is None:
        return None
    least, most = int(whole.min()), int(whole.max())
    for kind, (lowest, highest) in blocks.RANGES.items():
        block = GGML_QUANT_SIZES[kind][0]
        if width % block or only not in (None, kind):
            continue
        per_block = scale.repeat(width // block, axis=1)
        if lowest <= least and most <= highest:
            return Stored(kind, spec.shape, blocks.encode(whole, per_block, kind))
        if kind is not Type.Q4_0 or spec.bits > 4 or only is not None:
            continue
        minimum = _half(-numbers * zero.astype(np.float32))
        if minimum is not None:
            unsigned, minima = (whole + wide).astype(np.uint8), minimum.repeat(width // block, axis=1)
            return Stored(Type.Q4_1, spec.shape, blocks.encode_q4_1(unsigned, per_block, minima))
    return None


def _half(numbers: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """In half precision; None where that is not exact."""
    with np.errstate(over="ignore"):
        found = numbers.astype(np.float16)
    return found if np.array_equal(found.astype(np.float32), numbers) else None


def _floats(values: NDArray[np.float32]) -> Stored:
    """Matrices in the first of bfloat16, half precision and float32 that holds them; vectors in float32."""
    if values.ndim > 1:
        short = f32_to_bf16(values)
        if np.array_equal(bf16_to_f32(short), values):
            return Stored(Type.BF16, values.shape, short.view(np.uint8))
        half = _half(values)
        if half is not None:
            return Stored(Type.F16, values.shape, half.view(np.uint8))
    return Stored(Type.F32, values.shape, np.ascontiguousarray(values).view(np.uint8))
