"""Linears as the native engine takes them: their arrays, what they see of their inputs, and the transforms in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.core.paley import base_order, paley
from tulle.engine.checkpoint import Source
from tulle.engine.native_model import Absorbed, Floats, Grid, Group, Linear, LinearFacts, Selection, Transform
from tulle.engine.prepare import absorbed_names
from tulle.errors import UserError
from tulle.format.spec import LinearSpec
from tulle.models.description import LatentAttention
from tulle.models.description import Layer as DecoderLayer


class Tensors(Protocol):
    """Where the kernels' arrays come from."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> NDArray[Any]: ...


class Linears:
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

    def absorbed(self, name: str, mixer: LatentAttention) -> Absorbed:
        """What is made of a linear that gives keys and values."""
        spec = self._source.specs.get(name)
        rounded = spec is not None and spec.input_bits is not None
        keys, values = (
            self._piece(key, Grid(16 if rounded else self._engine_bits), engine_grid=True)
            for key in absorbed_names(name)
        )
        factors = self._array(absorbed_names(name)[0], "factors")
        return Absorbed(
            transforms=transforms_of(spec, self._source, spec.transform_of or name) if spec else [],
            input=_model_grid(spec) or Grid(),
            selection=selection(self._source, name, spec),
            keys=keys,
            values=values,
            parts=1 if factors is None else factors.size // (mixer.heads * mixer.plain_dim),
            factors=factors,
        )

    def linear(self, names: Sequence[str], key: str, spec: LinearSpec | None) -> Linear:
        """``names``: of the linears that are fused in it; ``key``: the name of its facts and arrays."""
        grid = _model_grid(spec)
        found = self._piece(key, grid or Grid(self._engine_bits), engine_grid=grid is None)
        found.bias, found.selection = bias_of(self._source, names), selection(self._source, names[0], spec)
        return found

    def _piece(self, key: str, grid: Grid, engine_grid: bool) -> Linear:
        """A linear without what a checkpoint has beside its weights; floats are given no grid of the engine's."""
        facts = self._facts[key]
        own = engine_grid and facts.kind.is_codes
        return Linear(
            facts=facts,
            values=self._array(key, "values"),
            masks=self._array(key, "masks"),
            offsets=self._array(key, "offsets"),
            starts=self._array(key, "starts"),
            scales=self._array(key, "scales"),
            row_scales=self._array(key, "row_scales"),
            zeros=self._array(key, "zeros"),
            minima=self._array(key, "minima"),
            bias=None,
            input=grid if own or not engine_grid else Grid(),
            engine_grid=own,
            selection=None,
        )

    def _array(self, key: str, suffix: str) -> Any:
        name = f"{key}.{suffix}"
        return self._file.tensor(name) if name in self._file else None


def names_of(layer: DecoderLayer, role: str) -> list[str]:
    """Full names of a group's linears."""
    return [layer.prefix + name for name in layer.group(role).names]


def bias_of(source: Source, names: Sequence[str]) -> Floats | None:
    """``[rows]`` of linears that are fused; None where the description gives none of them one. Biases that are stored
    though the config denies them are not read, as in transformers."""
    if not any(name in source.biased for name in names):
        return None
    return np.concatenate([
        source.floats(f"{name}.bias", source.shapes[name][:1]) if name in source.biased
        else np.zeros(source.shapes[name][0], np.float32)
        for name in names
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


def _model_grid(spec: LinearSpec | None) -> Grid | None:
    """In which a recipe quantises a linear's inputs; None where it does not."""
    if spec is None or spec.input_bits is None:
        return None
    return Grid(spec.input_bits, spec.input_symmetric, spec.input_clip)


def _equal(a: Floats | None, b: Floats | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


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
