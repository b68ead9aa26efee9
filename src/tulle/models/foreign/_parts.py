"""What the formats share: words of codes, 8-bit floats, and a source that dequantises."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.description import Decoder, describe
from tulle.models.renamed import Renamed
from tulle.models.tensor_file import TensorInfo, as_float32

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

LAYER = re.compile(r"model\.layers\.(\d+)\.")
HARMLESS = ("rotary_emb.inv_freq", "masked_bias", "self_attn.bias", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of names of buffers that old versions of transformers saved; they are computed, not read."""
INPUT_SUFFIXES = (
    "input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale", "output_zero_point",
    "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point",
)  # fmt: skip
"""Of a linear or an attention: how inputs, or keys and values, are quantised at run time. They stay floats here."""


class Format(Protocol):
    """How one tool stores linears."""

    title: str
    """For messages."""
    suffixes: tuple[str, ...]
    """All that a quantised linear may have, besides the bias."""

    def linears(self, stored: TensorSource) -> set[str]:
        """Names of the quantised linears."""
        ...

    def holder(self, stored: TensorSource, name: str) -> str:
        """The tensor that holds a linear's codes."""
        ...

    def dequantise(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """W ``[C_out, C_in]`` of a linear by name. Raises ``UserError`` for tensors that do not fit ``shape``."""
        ...

    def check(self, stored: TensorSource, name: str, shape: tuple[int, int]) -> None:
        """By headers alone: raises ``UserError`` where :meth:`dequantise` would."""
        ...


class Dequantised:
    """A quantised checkpoint as a dense one. Every tensor of it is understood, or refused by name."""

    plain = False

    def __init__(self, stored: TensorSource, form: Format):
        self.config = {k: v for k, v in stored.config.items() if k != "quantization_config"}
        model = describe(self.config)
        stored, left_out = _without_layers_behind(stored, len(model.layers))
        self._stored, self._format = stored, form
        self.path, self.tokenizer, self.files = stored.path, stored.tokenizer, stored.files
        shapes = linear_shapes(model)
        found = form.linears(stored)
        for name in sorted(found - shapes.keys()):
            raise UserError(
                f"expected {form.title} in linears of the model, found {name} in {self.path.name}; config and weights "
                "are not of one model"
            )
        self._linears = {name: shapes[name] for name in sorted(found)}
        for name, shape in self._linears.items():
            form.check(stored, name, shape)
        self._plain_names = self._understood(model)
        self.notes = [
            *stored.notes,
            f"{len(self._linears)} linears are stored in {form.title}; they are read as the float32 numbers they mean",
            *left_out,
        ]
        if any(name.endswith(INPUT_SUFFIXES) for name in stored.names()):
            self.notes.append("what the checkpoint says of quantised inputs, keys and values is not applied")

    def names(self) -> list[str]:
        return sorted([*self._plain_names, *(f"{name}.weight" for name in self._linears)])

    def __contains__(self, name: object) -> bool:
        return name in self._plain_names or self._linear(name) is not None

    def info(self, name: str) -> TensorInfo:
        linear = self._linear(name)
        if linear is None:
            return self._stored.info(name)
        holder = self._stored.info(self._format.holder(self._stored, linear))
        return TensorInfo("F32", self._linears[linear], holder.file)

    def read(self, name: str) -> NDArray[Any]:
        linear = self._linear(name)
        if linear is None:
            return self._stored.read(name)
        return self._format.dequantise(self._stored, linear, self._linears[linear])

    def identity(self) -> str:
        return self._stored.identity()

    def _linear(self, name: object) -> str | None:
        found = name.removesuffix(".weight") if isinstance(name, str) and name.endswith(".weight") else None
        return found if found in self._linears else None

    def _understood(self, model: Decoder) -> set[str]:
        """Names of tensors that are read as they are. Raises ``UserError`` for one that nothing here knows."""
        wanted = {*model.outer_tensors(), model.head}
        wanted |= {layer.prefix + name for layer in model.layers for name in layer.tensors()}
        known = {f"{name}.{suffix}" for name in self._linears for suffix in self._format.suffixes}
        plain = set()
        for name in self._stored.names():
            if name in known or name.endswith((*HARMLESS, *INPUT_SUFFIXES)):
                continue
            if name in wanted:
                plain.add(name)
            elif not self._is_empty_bias(name):
                raise UserError(
                    f"expected tensors that {self._format.title} has, found {name} in {self.path.name}; tulle cannot "
                    "tell what it means: give the unquantised checkpoint"
                )
        return plain

    def _is_empty_bias(self, name: str) -> bool:
        """Old packers stored biases of zeros for linears that have none."""
        if not name.endswith(".bias") or name.removesuffix(".bias") not in self._linears:
            return False
        return not as_float32(self._stored.read(name), self._stored.info(name).dtype).any()


def _without_layers_behind(stored: TensorSource, layers: int) -> tuple[TensorSource, list[str]]:
    """Without the tensors of layers behind the last, which predict further tokens (DeepSeek-V3, section 2.2); a note
    says so."""
    found = [name for name in stored.names() if (at := LAYER.match(name)) is not None and int(at[1]) >= layers]
    if not found:
        return stored, []
    note = f"tensors of layers behind the last, which predict further tokens, are left out: {len(found)}"
    return Renamed(stored, {name: name for name in sorted({*stored.names()} - {*found})}), [note]


def open_foreign(stored: TensorSource) -> Dequantised:
    """A folder whose ``quantization_config`` names another tool's method.

    Raises ``UserError`` for a method, or a variant of it, that is not read, by its name.
    """
    from tulle.models.foreign import awq, compressed_tensors, fp8, gptq

    settings = stored.config["quantization_config"]
    if not isinstance(settings, dict):
        raise UserError(f"expected an object as quantization_config, found {settings!r}; repair config.json")
    method = str(settings.get("quant_method")).lower()
    readers: Mapping[str, Any] = {
        "gptq": gptq.from_config,
        "awq": awq.from_config,
        "compressed-tensors": compressed_tensors.from_config,
        "fp8": fp8.from_config,
        "fbgemm_fp8": fp8.from_config,
    }
    if method not in readers:
        raise UserError(
            f"expected a quant_method of tulle, {', '.join(readers)}, found {settings.get('quant_method')!r} in "
            f"{stored.path.name}; give the unquantised checkpoint"
        )
    return Dequantised(stored, readers[method](settings))


def object_of(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object among the settings, empty where it is missing or null. Raises ``UserError`` for anything else."""
    found = settings.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"expected an object as {name}, found {found!r:.80}; repair config.json")
    return found


def linear_shapes(model: Decoder) -> dict[str, tuple[int, int]]:
    """``(C_out, C_in)`` of every linear by full name, the head included."""
    shapes = {layer.prefix + linear.name: linear.shape for layer in model.layers for linear in layer.linears()}
    return shapes | {model.head.removesuffix(".weight"): (model.vocabulary, model.hidden)}


def unpack_words(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """int32 ``[…, N]`` → codes ``[…, count]``: code i stands at bits i·b … i·b + b − 1 of the row of words, the first
    word's lowest bit being bit 0 (so that codes of 3 bits may lie across two words)."""
    stream = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 8:
        return stream[..., :count]
    if bits == 4:
        both = np.empty((*stream.shape, 2), np.uint8)
        both[..., 0], both[..., 1] = stream & 15, stream >> 4
        return both.reshape(*stream.shape[:-1], -1)[..., :count]
    one = np.unpackbits(stream, axis=-1, count=count * bits, bitorder="little")
    one = one.reshape(*one.shape[:-1], count, bits)
    codes = np.zeros(one.shape[:-1], np.uint8)
    for bit in range(bits):
        codes |= one[..., bit] << bit
    return codes


def words_of(count: int, bits: int) -> int:
    """int32 words that hold so many codes."""
    return -(-count * bits // 32)


def with_suffix(stored: TensorSource, suffix: str) -> set[str]:
    """Names in front of a suffix."""
    return {name.removesuffix(f".{suffix}") for name in stored.names() if name.endswith(f".{suffix}")}


def rows_of(stored: TensorSource, name: str) -> int:
    """First of a matrix' two sizes. Raises ``UserError`` for a tensor that is none."""
    shape = stored.info(name).shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"expected {name} as a matrix, found the shape {list(shape)}; copy the checkpoint again")
    return shape[0]


def scale_rows(
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32] | None,
    group: NDArray[Any],
    rows: int = 1,
) -> NDArray[np.float32]:
    """scale·(W − zero), in W's own memory.

    W ``[C_out, C_in]``; scale and zero ``[C_out/rows, G]``; ``group`` ``[C_in]``: the column of each input.
    """
    for row in range(len(weight)):
        if zero is not None:
            weight[row] -= zero[row // rows, group]
        weight[row] *= scale[row // rows, group]
    return weight


def groups_of(stored: TensorSource, name: str, inputs: int, count: int) -> NDArray[Any]:
    """``[C_in]``: group of each input, from the tensor ``name`` or, where there is none, in order and of one size."""
    if name not in stored:
        return np.arange(inputs) // (inputs // count)
    found = stored.read(name)
    if found.min() < 0 or found.max() >= count:
        raise UserError(
            f"expected groups from 0 to {count - 1} in {name}, found {found.min()} to {found.max()}; copy it again"
        )
    return found


def require(stored: TensorSource, name: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> None:
    """Raises ``UserError`` unless a tensor has one of these dtypes and one of these shapes."""
    info = stored.info(name)
    if info.dtype not in dtypes or info.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise UserError(
            f"expected {name} as {'/'.join(dtypes)} {wanted}, found {info.dtype} {list(info.shape)}; config and "
            "weights are not of one model, or the format is another one"
        )


def floats(stored: TensorSource, name: str) -> NDArray[np.float32]:
    """A float tensor in float32; scales may also be powers of two in 8 bits (E8M0)."""
    info = stored.info(name)
    if info.dtype == "F8_E8M0":
        return np.ldexp(1.0, stored.read(name).astype(np.int32) - 127).astype(np.float32)
    return as_float32(stored.read(name), info.dtype)
