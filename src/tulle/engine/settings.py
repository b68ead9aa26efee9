"""A model as the native engine takes it: from a checkpoint and its packed linears to ``native_model.Model``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.core.paley import base_order, hadamard_block, paley
from tulle.engine.checkpoint import Source
from tulle.engine.native_model import (
    Floats,
    Grid,
    Group,
    Layer,
    Linear,
    LinearFacts,
    Model,
    Selection,
    Table,
    Transform,
    WeightKind,
)
from tulle.errors import UserError
from tulle.format.spec import HeadSpec, LinearSpec

GATES = {"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}


class Tensors(Protocol):
    """Where the kernels' arrays come from."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> NDArray[Any]: ...


def settings_of(
    source: Source, file: Tensors, facts: Mapping[str, LinearFacts], engine_bits: int, blocks: Iterable[int]
) -> Model:
    """The model with these of its blocks; inputs of integer weights that the checkpoint leaves unquantised get
    ``engine_bits`` bits. Raises ``UserError`` for what the engine cannot run."""
    anatomy, config = source.anatomy, source.config
    attention = source.packed.attention if source.packed else None
    gate = GATES.get(config.get("hidden_act", "silu"))
    if gate is None:
        raise UserError(f"expected hidden_act of {', '.join(GATES)}, found {config['hidden_act']!r}")
    linears = _Linears(source, file, facts, engine_bits)
    rows = {row.role: row for row in anatomy.rows}
    query_norm, key_norm = anatomy.query_key_norms or (None, None)
    layers = []
    for index in blocks:
        prefix = anatomy.block_prefix(index)

        def gain(name: str | None, size: int, prefix: str = prefix) -> Any:
            return None if name is None else source.floats(f"{prefix}{name}.weight", (size,))

        groups = {row.role: linears.group(names) for row, names in zip(anatomy.rows, source.groups[index], strict=True)}
        layers.append(
            Layer(
                input_norm=gain(rows["qkv"].norm, anatomy.hidden),
                post_norm=gain(rows["gate_up"].norm, anatomy.hidden),
                query_norm=gain(query_norm, anatomy.head_dim),
                key_norm=gain(key_norm, anatomy.head_dim),
                window=window(config, index),
                **groups,
            )
        )
    head = anatomy.architecture.embedding if anatomy.tied else anatomy.architecture.head
    frequencies, scale = rope(config, anatomy.head_dim)
    rotation = None
    if attention and attention.hadamard and hadamard_block(anatomy.head_dim) > 1:
        rotation = hadamard(anatomy.head_dim, hadamard_block(anatomy.head_dim))
    return Model(
        hidden=anatomy.hidden,
        intermediate=anatomy.intermediate,
        heads=anatomy.heads,
        kv_heads=anatomy.kv_heads,
        head_dim=anatomy.head_dim,
        vocabulary=anatomy.vocabulary,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        gate=gate,
        inverse_frequencies=frequencies.tolist(),
        rope_scale=scale,
        query=_head_grid(attention.query if attention else None),
        key=_head_grid(attention.key if attention else None),
        value=_head_grid(attention.value if attention else None),
        head_rotation=rotation,
        embedding=_table(source, source.embedding_name()),
        layers=layers,
        norm=source.floats(anatomy.architecture.final_norm, (anatomy.hidden,)),
        head=Group([], [linears.linear([head.removesuffix(".weight")], "head", None)]),
        exact_head=_table(source, source.head_name()) if facts["head"].kind.is_codes else None,
    )


class _Linears:
    """Packed linears with what belongs to them."""

    def __init__(self, source: Source, file: Tensors, facts: Mapping[str, LinearFacts], engine_bits: int):
        self._source, self._file, self._facts, self._engine_bits = source, file, facts, engine_bits

    def group(self, names: Sequence[str]) -> Group:
        """Linears that share an input, by their full names."""
        specs = self._source.specs
        spec = specs.get(names[0])
        if any((s.transform if (s := specs.get(n)) else ()) != (spec.transform if spec else ()) for n in names):
            raise UserError(f"expected the same transforms in front of {', '.join(names)}, found different ones")
        transforms = transforms_of(spec, self._source, spec.transform_of or names[0]) if spec else []
        if all(name in self._facts for name in names):
            linears = [self.linear([name], name, specs.get(name)) for name in names]
        else:  # fused, under the first one's name
            linears = [self.linear(names, names[0], spec)]
        first = linears[0].selection
        for found in (one.selection for one in linears[1:]):
            if found and first and _equal(found.score, first.score):
                found.score = first.score  # the same array: linears that see the same inputs share them
        return Group(transforms, linears)

    def linear(self, names: Sequence[str], key: str, spec: LinearSpec | None) -> Linear:
        """``names``: of the linears that are fused in it; ``key``: the name of its facts and arrays."""
        facts = self._facts[key]
        model_grid = spec is not None and spec.input_bits is not None
        grid = Grid()
        if spec is not None and spec.input_bits is not None:
            grid = Grid(spec.input_bits, spec.input_symmetric, spec.input_clip)
        elif facts.kind.is_codes:
            grid = Grid(self._engine_bits)

        def array(suffix: str) -> Any:
            name = f"{key}.{suffix}"
            return self._file.tensor(name) if name in self._file else None

        return Linear(
            facts=facts,
            values=array("values"),
            masks=array("masks"),
            offsets=array("offsets"),
            starts=array("starts"),
            scales=array("scales"),
            zeros=array("zeros"),
            bias=bias_of(self._source, names, facts.rows),
            input=grid,
            engine_grid=facts.kind.is_codes and not model_grid,
            selection=selection(self._source, names[0], spec),
        )


def _equal(a: Floats | None, b: Floats | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def bias_of(source: Source, names: Sequence[str], rows: int) -> Floats | None:
    """``[rows]`` of linears that are fused; None where none of them has one."""
    if not any(f"{name}.bias" in source for name in names):
        return None
    counts = [rows] if len(names) == 1 else [source.shapes[name][0] for name in names]
    return np.concatenate([
        source.floats(f"{name}.bias", (n,)) if f"{name}.bias" in source else np.zeros(n, np.float32)
        for name, n in zip(names, counts, strict=True)
    ])  # fmt: skip


def selection(source: Source, name: str, spec: LinearSpec | None) -> Selection | None:
    """Which inputs a linear sees."""
    found = None if spec is None else spec.input_sparsity
    if spec is None or found is None:
        return None
    columns = spec.shape[1]
    return Selection(
        kind=found.kind,
        keep=found.keep or 0,
        block=found.block or columns,
        unit=found.unit,
        norm=found.by == "norm",
        threshold=found.threshold or 0.0,
        rescale=found.rescale,
        score=source.floats(f"{name}.input_score", (columns,)) if found.weighted else None,
    )


def _table(source: Source, name: str) -> Table:
    """Embedding or head as it is stored: bits of bfloat16, or float32."""
    values = source.kernel_floats(name, (source.anatomy.vocabulary, source.anatomy.hidden))
    return Table(WeightKind.BF16 if source.dtype(name) == "BF16" else WeightKind.F32, values.reshape(-1))


def _head_grid(spec: HeadSpec | None) -> Grid:
    return Grid() if spec is None else Grid(spec.bits, spec.symmetric, spec.clip)


def window(config: Mapping[str, Any], layer: int) -> int:
    """Tokens that attention of a layer reaches back, 0 for all."""
    size = config.get("sliding_window")
    if not isinstance(size, int):
        return 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return size if layer < len(kinds) and kinds[layer] == "sliding_attention" else 0
    if config.get("model_type") == "mistral":
        return size
    if not config.get("use_sliding_window", False):
        return 0
    return size if layer >= int(config.get("max_window_layers", 0)) else 0


def rope(config: Mapping[str, Any], head_dim: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies ``[head_dim/2]`` and the factor on cosines and sines.

    Plain, ``linear`` and ``llama3`` scaling. Raises ``UserError`` for another.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(found.get("rope_theta", config.get("rope_theta", 10000.0)))
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "linear":
        inverse /= float(found["factor"])
    elif kind == "llama3":
        factor, low, high = (float(found[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = float(found["original_max_position_embeddings"]) * inverse / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clip(0, 1)
        inverse = (1 - smooth) * inverse / factor + smooth * inverse
    elif kind != "default":
        raise UserError(f"expected rotary embeddings of type default, linear or llama3, found {kind!r}")
    return inverse.astype(np.float32), 1.0


def transforms_of(spec: LinearSpec, source: Source, name: str) -> list[Transform]:
    """The transforms in front of a linear; ``name`` holds their tensors."""
    return [
        transform(t.to_json(), spec.shape[1], {
            suffix: source.tensor(f"{name}.transform.{number}.{suffix}", shape)
            for suffix, (_, shape) in t.tensors(spec.shape[1]).items()
        })
        for number, t in enumerate(spec.transform)
    ]  # fmt: skip


def transform(spec: Mapping[str, Any], channels: int, tensors: Mapping[str, NDArray[Any]]) -> Transform:
    """One transform: its sizes and numbers, in float32."""
    kind = spec["kind"]
    numbers = {suffix: t.astype(np.float32) for suffix, t in tensors.items() if t.dtype != np.int32}
    if kind == "diagonal":
        return Transform(kind, channels, numbers=numbers["scale"].reshape(-1))
    if kind == "permutation":
        return Transform(kind, channels, index=np.ascontiguousarray(tensors["index"]))
    if kind == "block_matrix":
        matrix = numbers["matrix"].reshape(-1)
        return Transform(kind, channels, block=spec["block"], shared=spec["shared"], numbers=matrix)
    if kind == "kronecker":
        both = np.concatenate([numbers["left"].T.reshape(-1), numbers["right"].reshape(-1)])
        return Transform(kind, channels, left=spec["left"], right=spec["right"], numbers=both)
    return hadamard(channels, spec["block"])


def hadamard(channels: int, block: int) -> Transform:
    """A Hadamard transform of blocks of so many channels; the order's factor m that is no power of two has H_mᵀ."""
    base = base_order(block)
    if base is None:
        raise UserError(f"expected a Hadamard order, found a block of {block} channels; the file is broken")
    matrix = np.ascontiguousarray(paley(base).T.astype(np.float32)).reshape(-1) if base > 1 else None
    return Transform("hadamard", channels, block=block, base=base, numbers=matrix)
