"""Which tensors a compressed linear is stored as, and the `quantization_config` that says so.

docs/reference/format.md, sections "config.json" and "Tensors of a linear", is the specification.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from tulle.errors import UserError

QUANT_METHOD = "tulle"
FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)
"""Version 2 knows no sparse inputs; 3 no scales of 8 bits, no packed zero points and no floats of 4 bits."""

ITEM_BYTES = {"uint8": 1, "int32": 4, "bfloat16": 2, "float16": 2, "float32": 4}
SAFETENSORS_DTYPE = {"uint8": "U8", "int32": "I32", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of our dtypes in the header of a safetensors file."""
FLOAT_DTYPES = ("bfloat16", "float16", "float32")


FLOAT_FORMATS = {"mxfp4": 32, "nvfp4": 16}
"""Floats of four bits that codes may be, and how many input channels share a scale."""
TRANSFORMS = ("diagonal", "permutation", "hadamard", "block_matrix", "kronecker")


@dataclass(frozen=True)
class TransformSpec:
    """One linear map on the input x `[C_in]` of a linear. Raises UserError if fields contradict each other.

    docs/reference/format.md, section "Transforms", says what each kind computes.
    """

    kind: str
    block: int | None = None
    """Channels that a Hadamard or block matrix mixes."""
    shared: bool | None = None
    """Of a block matrix: one for all blocks, or one each."""
    left: int | None = None
    right: int | None = None
    """Sizes of the factors of a Kronecker product."""

    def problem(self, c_in: int) -> str | None:
        """Why this map cannot stand in front of a linear of `c_in` inputs, or None."""
        used = {
            "diagonal": (), "permutation": (), "hadamard": ("block",), "block_matrix": ("block", "shared"),
            "kronecker": ("left", "right"),
        }.get(self.kind)  # fmt: skip
        if used is None:
            return f"expected a transform of {', '.join(TRANSFORMS)}, found {self.kind!r}"
        for key in ("block", "shared", "left", "right"):
            if (getattr(self, key) is None) == (key in used):
                return (
                    f"expected {' and '.join(used) or 'no sizes'} for a {self.kind} transform, found {self.to_json()}"
                )
        if self.block is not None and (self.block < 1 or c_in % self.block):
            return f"expected a {self.kind} block that divides {c_in} input channels, found {self.block}"
        if self.left is not None and self.right is not None and (self.left < 1 or self.left * self.right != c_in):
            return f"expected Kronecker factors of product {c_in}, found {self.left} and {self.right}"
        return None

    def tensors(self, c_in: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (dtype, shape) of the map's tensors."""
        if self.kind == "diagonal":
            return {"scale": ("float32", (c_in,))}
        if self.kind == "permutation":
            return {"index": ("int32", (c_in,))}
        if self.kind == "block_matrix" and self.block is not None:
            square = (self.block, self.block)
            return {"matrix": ("float16", square if self.shared else (c_in // self.block, *square))}
        if self.kind == "kronecker" and self.left is not None and self.right is not None:
            return {"left": ("float16", (self.left, self.left)), "right": ("float16", (self.right, self.right))}
        return {}

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, data: object) -> TransformSpec:
        """Inverse of `to_json`. Raises UserError on unknown or mistyped keys."""
        hints = get_type_hints(cls)
        whole = {key: None for key in hints} | data if isinstance(data, dict) else data
        return cls(**_checked(whole, hints, "a transform"))


@dataclass(frozen=True)
class InputSparsitySpec:
    """Which inputs of a linear a token keeps.

    docs/reference/format.md, section "Sparse inputs", says what each kind computes."""

    kind: str
    keep: int | None = None
    """Of top_k: channels kept in every block."""
    block: int | None = None
    """Channels that compete with each other; None: all."""
    unit: int = 1
    """Consecutive channels that are kept or dropped together."""
    by: str = "max"
    """What of a unit is compared: the largest magnitude (max) or the 2-norm (norm)."""
    weighted: bool = False
    """Magnitudes are multiplied by the tensor `input_score` before they are compared."""
    rescale: bool = False
    """The kept inputs are multiplied by the token's 2-norm over theirs."""
    threshold: float | None = None

    def problem(self, c_in: int) -> str | None:
        """Why this cannot stand in front of a linear of `c_in` inputs, or None."""
        if self.kind not in INPUT_SPARSITIES:
            return f"expected input_sparsity of {', '.join(INPUT_SPARSITIES)}, found {self.kind!r}"
        if (self.threshold is not None) != (self.kind == "threshold"):
            return f"expected a threshold with kind threshold and no other, found {self.threshold} with {self.kind}"
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            return f"expected a finite threshold of 0 or more, found {self.threshold}"
        if self.kind != "top_k":
            if (self.keep, self.block, self.unit, self.by, self.weighted) != (None, None, 1, "max", False):
                return f"expected keep, block, unit, by and weighted only with top_k, found them with {self.kind}"
            return None
        width = c_in if self.block is None else self.block
        if self.unit < 1 or width < 1 or c_in % width or width % self.unit:
            return (
                f"expected a block that divides {c_in} input channels and a unit that divides the block, found "
                f"block {self.block} and unit {self.unit}"
            )
        if self.keep is None or not 0 < self.keep <= width or self.keep % self.unit:
            return f"expected keep from {self.unit} to {width} in steps of {self.unit}, found {self.keep}"
        return None if self.by in ("max", "norm") else f"expected by to be max or norm, found {self.by!r}"

    def share(self, c_in: int) -> float | None:
        """Share of `c_in` inputs that are dropped, where it is the same for every token."""
        return None if self.keep is None else 1 - self.keep / (self.block or c_in)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> InputSparsitySpec:
        """Inverse of `to_json`. Raises UserError on unknown, missing or mistyped keys."""
        return cls(**_checked(data, get_type_hints(cls), "input_sparsity"))


INPUT_SPARSITIES = ("top_k", "threshold", "relu")


@dataclass(frozen=True)
class LinearSpec:
    """How one linear, weight `[C_out, C_in]`, is stored. Raises UserError if fields contradict each other."""

    shape: tuple[int, int]
    bits: int | None = None
    """2-8, or None: the weights keep `values_dtype`."""
    group_size: int | None = None
    """Input channels that share a scale; None: one scale per output channel."""
    symmetric: bool = True
    sparse: bool = False
    nonzeros: int | None = None
    """Stored weights of a sparse linear."""
    pattern: str | None = None
    """N:M, such as 2:4: at most N of M consecutive input channels, from a multiple of M on, are stored."""
    input_bits: int | None = None
    """2-8: the input, after its transforms, is quantised per token, dynamically; None: it is not."""
    input_symmetric: bool = True
    input_clip: float = 1.0
    """The range of a token is multiplied by this ratio, in (0, 1], before it is divided into steps."""
    input_sparsity: InputSparsitySpec | None = None
    """Which inputs a token keeps, after transforms and quantisation; None: all."""
    transform: tuple[TransformSpec, ...] = ()
    """Maps applied to the input, from left to right; the weight is stored as W·T⁻ᵀ."""
    transform_of: str | None = None
    """The linear that holds this one's transform tensors (they share an input); None: its own."""
    values_dtype: str | None = None
    """Of unquantised weights: bfloat16, float16 or float32."""
    scale_bits: int = 16
    """16: scales are bfloat16; 8: whole numbers of one byte, times a bfloat16 per output channel (`row_scale`), or, of
    a float `format`, that format's byte."""
    zero_point_bits: int | None = None
    """None: zero points are packed like codes; 8: a byte each, as files of version 2 and 3 have them."""
    format: str = "int"
    """What codes are: whole numbers, or E2M1 floats, mxfp4 or nvfp4."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UserError(f"linear of shape {list(self.shape)}: {problem}")

    def _problem(self) -> str | None:
        c_out, c_in = self.shape
        if c_out < 1 or c_in < 1:
            return "expected positive sizes"
        if self.bits is None:
            if self.values_dtype not in FLOAT_DTYPES:
                names = ", ".join(FLOAT_DTYPES)
                return f"expected bits, or values_dtype of {names}, found values_dtype {self.values_dtype}"
            if self.group_size is not None or not self.symmetric or self.scale_bits != 16:
                return "expected bits with group_size, symmetric: false or scale_bits, found none; set bits to 2-8"
        else:
            if not 2 <= self.bits <= 8:
                return f"expected bits 2-8, found {self.bits}"
            if self.values_dtype is not None:
                return f"expected no values_dtype with bits, found {self.values_dtype}"
            if self.group_size is not None and (self.group_size < 1 or c_in % self.group_size):
                return f"expected a group_size that divides {c_in} input channels, found {self.group_size}"
            if self.scale_bits not in (8, 16):
                return f"expected scale_bits 8 or 16, found {self.scale_bits}"
        if self.format not in ("int", *FLOAT_FORMATS):
            return f"expected a format of int, {', '.join(FLOAT_FORMATS)}, found {self.format!r}"
        if self.format != "int":
            found = (self.bits, self.group_size, self.symmetric, self.scale_bits)
            if found != (4, FLOAT_FORMATS[self.format], True, 8):
                return (
                    f"expected bits 4, group_size {FLOAT_FORMATS[self.format]}, symmetric and scale_bits 8 with "
                    f"{self.format}, found {self.bits}, {self.group_size}, {self.symmetric} and {self.scale_bits}"
                )
        if self.zero_point_bits is not None and (self.symmetric or self.zero_point_bits != 8):
            return f"expected zero_point_bits null, or 8 with symmetric: false, found {self.zero_point_bits}"
        return self._input_problem() or self._sparsity_problem()

    def _input_problem(self) -> str | None:
        if self.input_bits is None and (not self.input_symmetric or self.input_clip != 1):
            return "expected input_symmetric and input_clip only with input_bits"
        if self.input_bits is not None and not 2 <= self.input_bits <= 8:
            return f"expected input_bits 2-8 or null, found {self.input_bits}"
        if not 0 < self.input_clip <= 1:
            return f"expected input_clip above 0 and at most 1, found {self.input_clip}"
        if self.transform_of is not None and not self.transform:
            return "expected transform_of only with a transform"
        if self.input_sparsity is not None and (problem := self.input_sparsity.problem(self.shape[1])):
            return problem
        return next((problem for t in self.transform if (problem := t.problem(self.shape[1]))), None)

    def _sparsity_problem(self) -> str | None:
        c_out, c_in = self.shape
        if not self.sparse:
            if self.nonzeros is not None or self.pattern is not None:
                return "expected nonzeros and pattern only where sparse is true"
            return None
        if self.nonzeros is None or not 0 <= self.nonzeros <= c_out * c_in:
            return f"expected nonzeros from 0 to {c_out * c_in}, found {self.nonzeros}"
        if self.pattern is not None:
            n, m = parse_pattern(self.pattern)
            if c_in % m:
                return f"expected a pattern whose M divides {c_in} input channels, found {self.pattern}"
            most = c_out * c_in // m * n
            if self.nonzeros > most:
                return f"expected at most {most} nonzeros for {self.pattern}, found {self.nonzeros}"
        return None

    @property
    def groups(self) -> int:
        """Scales per output channel, G."""
        return 1 if self.group_size is None else self.shape[1] // self.group_size

    @property
    def stored(self) -> int:
        """Weights that have a code or value in the file."""
        return self.shape[0] * self.shape[1] if self.nonzeros is None else self.nonzeros

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (dtype, shape) of every tensor that stands for `NAME.weight`, stored as `NAME.suffix`."""
        c_out, c_in = self.shape
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.sparse:
            tensors["mask"] = ("uint8", (c_out, -(-c_in // 8)))
            if self.bits is None:
                tensors["values"] = (str(self.values_dtype), (self.stored,))
            else:
                tensors["values"] = ("uint8", code_shape(self.bits, (self.stored,)))
        elif self.bits is None:
            tensors["weight"] = (str(self.values_dtype), self.shape)
        else:
            tensors["codes"] = ("uint8", code_shape(self.bits, self.shape))
        if self.bits is not None:
            grid = (c_out, self.groups)
            tensors["scale"] = ("bfloat16" if self.scale_bits == 16 else "uint8", grid)
            if self.format == "nvfp4":
                tensors["tensor_scale"] = ("float32", (1,))
            elif self.scale_bits == 8 and self.format == "int":
                tensors["row_scale"] = ("bfloat16", (c_out,))
            if not self.symmetric:
                tensors["zero_point"] = ("uint8", code_shape(self.zero_point_bits or self.bits, grid))
        return tensors

    def transform_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (dtype, shape) of the transform tensors that this linear itself holds."""
        if self.transform_of is not None:
            return {}
        return {
            f"transform.{i}.{suffix}": kind
            for i, t in enumerate(self.transform)
            for suffix, kind in t.tensors(self.shape[1]).items()
        }

    def input_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (dtype, shape) of what the selection of inputs needs."""
        weighted = self.input_sparsity is not None and self.input_sparsity.weighted
        return {"input_score": ("float32", (self.shape[1],))} if weighted else {}

    def stored_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """`tensors`, `transform_tensors` and `input_tensors`: everything under this linear's name but the bias."""
        return self.tensors() | self.transform_tensors() | self.input_tensors()

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors that stand for the weight; transforms are counted on their own."""
        return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and masks included, per weight of the dense matrix."""
        return 8 * self.packed_bytes / math.prod(self.shape)

    @property
    def transform_bytes(self) -> int:
        """Bytes of the transform tensors that this linear holds."""
        return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in self.transform_tensors().values())

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "shape": list(self.shape),
            "transform": [t.to_json() for t in self.transform],
            "input_sparsity": None if self.input_sparsity is None else self.input_sparsity.to_json(),
        }

    @classmethod
    def from_json(cls, data: object) -> LinearSpec:
        """Inverse of `to_json`. Raises UserError on unknown, missing or mistyped keys."""
        nested = {"shape": list, "transform": list, "input_sparsity": (dict, type(None))}
        fields = dict(_checked(data, get_type_hints(cls) | nested, "a linear"))
        fields["transform"] = tuple(TransformSpec.from_json(t) for t in fields["transform"])
        if fields["input_sparsity"] is not None:
            fields["input_sparsity"] = InputSparsitySpec.from_json(fields["input_sparsity"])
        if len(fields["shape"]) != 2 or any(type(size) is not int for size in fields["shape"]):
            raise UserError(f"a linear: expected shape [C_out, C_in], found {fields['shape']}")
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def code_shape(bits: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the uint8 tensor that holds codes of the given shape, packed along the last axis."""
    *rows, n = shape
    if bits == 8:
        return shape
    if bits == 4:
        return (*rows, -(-n // 2))
    return (*rows, bits, -(-n // 8))


def parse_pattern(pattern: str) -> tuple[int, int]:
    """N:M -> (N, M). Raises UserError unless 0 < N <= M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n <= m:
        raise UserError(f"expected a pattern N:M with 0 < N <= M, such as 2:4, found {pattern!r}")
    return n, m


@dataclass(frozen=True)
class HeadSpec:
    """How queries, keys or values are quantised: per token and head, over head_dim."""

    bits: int
    symmetric: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"attention: expected bits 2-8, found {self.bits}")
        if not 0 < self.clip <= 1:
            raise UserError(f"attention: expected clip above 0 and at most 1, found {self.clip}")


@dataclass(frozen=True)
class AttentionSpec:
    """What happens to queries and keys after RoPE and to values, in every block: None leaves them alone."""

    query: HeadSpec | None = None
    key: HeadSpec | None = None
    value: HeadSpec | None = None
    hadamard: bool = False
    """Queries and keys are multiplied by H/√head_dim before they are quantised, which their products do not see."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> AttentionSpec:
        """Inverse of `to_json`. Raises UserError on unknown, missing or mistyped keys."""
        hints: dict[str, Any] = dict.fromkeys(("query", "key", "value"), (dict, type(None)))
        fields = _checked(data, hints | {"hadamard": bool}, "attention")
        query, key, value = (
            None if fields[name] is None else HeadSpec(**_checked(fields[name], HEAD_HINTS, name)) for name in hints
        )
        return cls(query, key, value, fields["hadamard"])


HEAD_HINTS = {"bits": int, "symmetric": bool, "clip": float}


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization_config` of config.json: the compressed linears by module name, and the recipe."""

    linears: dict[str, LinearSpec]
    """Of the blocks; the head, and the embedding (C_out: the vocabulary), where they are in codes too."""
    recipe: dict[str, Any] = field(default_factory=dict)
    attention: AttentionSpec | None = None

    def __post_init__(self) -> None:
        for name, spec in self.linears.items():
            if spec.transform_of is None:
                continue
            holder = self.linears.get(spec.transform_of)
            if holder is None or holder.transform_of is not None or holder.transform != spec.transform:
                raise UserError(
                    f"quantization_config, {name}: expected transform_of to name a linear that holds the same "
                    f"transform, found {spec.transform_of!r}"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "linears": {name: spec.to_json() for name, spec in self.linears.items()},
            "attention": None if self.attention is None else self.attention.to_json(),
            "recipe": self.recipe,
        }

    @classmethod
    def from_json(cls, data: object) -> QuantizationConfig:
        """Inverse of `to_json`. Raises UserError on another method, a newer version or a malformed entry."""
        hints: dict[str, Any] = {"quant_method": str, "format_version": int, "linears": dict, "recipe": dict}
        hints["attention"] = (dict, type(None))
        fields = _checked(data, hints, "quantization_config")
        if fields["quant_method"] != QUANT_METHOD:
            raise UserError(f"expected quant_method {QUANT_METHOD!r}, found {fields['quant_method']!r}")
        version = fields["format_version"]
        if version not in READABLE_VERSIONS:
            raise UserError(
                f"expected format_version {' or '.join(map(str, READABLE_VERSIONS))}, found {version}; "
                "read it with the version of tulle that wrote it"
            )
        linears = {}
        for name, entry in fields["linears"].items():
            if version < FORMAT_VERSION and isinstance(entry, dict):
                entry = _of_older(version, entry)
            try:
                linears[name] = LinearSpec.from_json(entry)
            except UserError as error:
                raise UserError(f"quantization_config, {name}: {error}") from None
        attention = None if fields["attention"] is None else AttentionSpec.from_json(fields["attention"])
        return cls(linears, fields["recipe"], attention)


def _of_older(version: int, entry: dict[str, Any]) -> dict[str, Any]:
    """A linear's fields as this version has them."""
    older = {"scale_bits": 16, "format": "int", "zero_point_bits": 8 if entry.get("symmetric") is False else None}
    for name in older.keys() & entry.keys():
        raise UserError(f"expected no {name} in format_version {version}, found {entry[name]!r}")
    return ({"input_sparsity": None} if version == 2 else {}) | older | entry


def _checked(data: object, hints: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`data` as a dict with exactly the keys of `hints`, each an instance of its type."""
    if not isinstance(data, dict):
        raise UserError(f"{what}: expected an object, found {type(data).__name__}")
    for key in hints:
        if key not in data:
            raise UserError(f"{what}: expected the key {key!r}, found {', '.join(map(str, data)) or 'none'}")
    for key, value in data.items():
        if key not in hints:
            raise UserError(f"{what}: expected the keys {', '.join(hints)}, found {key!r}")
        # JSON's true is not a number, but Python's True is an int.
        mistyped_bool = isinstance(value, bool) and hints[key] not in (bool, bool | None)
        if mistyped_bool or not isinstance(value, hints[key]):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise UserError(f"{what}: expected {key} to be {expected}, found {value!r}")
    return data
