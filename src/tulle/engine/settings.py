"""A model as the native engine takes it: sizes, arrays, transforms and quantisers in one dictionary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.core.paley import base_order, hadamard_block, paley
from tulle.engine.prepare import Source
from tulle.errors import UserError
from tulle.format.spec import HeadSpec, LinearSpec

NO_GRID = {"bits": 0, "symmetric": True, "clip": 1.0, "own": False}
"""``own``: not the model's, but the engine's, which comes after the selection of inputs."""
GATES = {"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}


class Tensors(Protocol):
    """Where the kernels' arrays come from."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> NDArray[Any]: ...


def settings_of(
    source: Source, file: Tensors, facts: Mapping[str, Any], unquantised: int, blocks: Iterable[int]
) -> dict[str, Any]:
    """The model with these of its blocks; inputs of integer weights that the file leaves unquantised get
    ``unquantised`` bits."""
    model, config, packed = source.anatomy, source.config, source.packed
    specs = packed.linears if packed else {}
    attention = packed.attention if packed else None
    gate = GATES.get(config.get("hidden_act", "silu"))
    if gate is None:
        raise UserError(f"expected hidden_act of {', '.join(GATES)}, found {config['hidden_act']!r}")

    def linear(names: Sequence[str], key: str, spec: LinearSpec | None) -> dict[str, Any]:
        found = facts[key]
        grid = dict(NO_GRID)
        if spec is not None and spec.input_bits is not None:
            grid |= {"bits": spec.input_bits, "symmetric": spec.input_symmetric, "clip": spec.input_clip}
        elif found["kind"].startswith("codes"):
            grid |= {"bits": unquantised, "own": True}
        arrays = {
            suffix: file.tensor(f"{key}.{suffix}") if f"{key}.{suffix}" in file else None
            for suffix in ("values", "masks", "offsets", "starts", "scales", "zeros")
        }
        return (
            dict(found)
            | arrays
            | {
                "bias": bias_of(source, names, found["rows"]),
                "input": grid,
                "selection": selection(source, names[0], spec),
            }
        )

    def group(prefix: str, names: Sequence[str]) -> dict[str, Any]:
        full = [prefix + name for name in names]
        spec = specs.get(full[0])
        if any((s.transform if (s := specs.get(n)) else ()) != (spec.transform if spec else ()) for n in full):
            raise UserError(f"expected the same transforms in front of {', '.join(full)}, found different ones")
        transforms = transform_facts(spec, source, spec.transform_of or full[0]) if spec else []
        # Those that stand together with an earlier one have no facts of their own.
        alone = len(full) == sum(n in facts for n in full)
        linears = [linear([n] if alone else full, n, specs.get(n)) for n in (full if alone else full[:1])]
        for found in (one["selection"] for one in linears[1:]):
            first = linears[0]["selection"]
            if found and first and found["score"] is not None and np.array_equal(found["score"], first["score"]):
                found["score"] = first["score"]  # the same array: linears that see the same inputs share them
        return {"transforms": transforms, "linears": linears}

    rows = {row.role: row for row in model.rows}
    layers = []
    for index in blocks:
        prefix = model.block_prefix(index)

        def gain(name: str | None, size: int, prefix: str = prefix) -> NDArray[np.float32] | None:
            return None if name is None else source.floats(f"{prefix}{name}.weight", (size,))

        query, key = model.query_key_norms or (None, None)
        layers.append(
            {role: group(prefix, row.linears) for role, row in rows.items()}
            | {
                "input_norm": gain(rows["qkv"].norm, model.hidden),
                "post_norm": gain(rows["gate_up"].norm, model.hidden),
                "query_norm": gain(query, model.head_dim),
                "key_norm": gain(key, model.head_dim),
                "window": window(config, index),
            }
        )
    head = model.architecture.embedding if model.tied else model.architecture.head
    table = source.embedding_name()
    embedding = source.tensor(table, (model.vocabulary, model.hidden))
    bf16 = source.dtype(table) == "BF16"
    exact, exact_kind = _exact_head(source, facts["head"]["kind"])
    frequencies, scale = rope(config, model.head_dim)
    rotation = None
    if attention and attention.hadamard and hadamard_block(model.head_dim) > 1:
        rotation = {"kind": "hadamard", "channels": model.head_dim} | hadamard(hadamard_block(model.head_dim))
    return {
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocabulary": model.vocabulary,
        "eps": float(config.get("rms_norm_eps", 1e-6)),
        "gate": gate,
        "inverse_frequencies": frequencies.tolist(),
        "rope_scale": scale,
        "query": _head(attention.query if attention else None),
        "key": _head(attention.key if attention else None),
        "value": _head(attention.value if attention else None),
        "head_rotation": rotation,
        "embedding_kind": "bf16" if bf16 else "f32",
        "embedding": (embedding if bf16 else embedding.astype(np.float32)).reshape(-1),
        "exact_head": exact,
        "exact_kind": exact_kind,
        "norm": source.floats(model.architecture.final_norm, (model.hidden,)),
        "head": {"transforms": [], "linears": [linear([head.removesuffix(".weight")], "head", None)]},
        "layers": layers,
    }


def bias_of(source: Source, names: Sequence[str], rows: int) -> NDArray[np.float32] | None:
    """``[rows]`` of linears that stand together; None where none of them has one."""
    if not any(f"{name}.bias" in source for name in names):
        return None
    counts = [rows] if len(names) == 1 else [source.anatomy.linear_shape(name)[0] for name in names]
    return np.concatenate([
        source.floats(f"{name}.bias", (n,)) if f"{name}.bias" in source else np.zeros(n, np.float32)
        for name, n in zip(names, counts, strict=True)
    ])  # fmt: skip


def selection(source: Source, name: str, spec: LinearSpec | None) -> dict[str, Any] | None:
    """Which inputs a linear sees, as the native engine takes it."""
    found = None if spec is None else spec.input_sparsity
    if spec is None or found is None:
        return None
    columns = spec.shape[1]
    return {
        "kind": found.kind, "keep": found.keep or 0, "block": found.block or columns, "unit": found.unit,
        "norm": found.by == "norm", "threshold": found.threshold or 0.0, "rescale": found.rescale,
        "score": source.floats(f"{name}.input_score", (columns,)) if found.weighted else None,
    }  # fmt: skip


def _exact_head(source: Source, kind: str) -> tuple[NDArray[Any] | None, str]:
    """The output head as it is stored (its bits, or float32) beside a rougher copy in codes, and its kind."""
    model = source.anatomy
    name = source.head_name()
    if not kind.startswith("codes"):
        return None, "f32"
    stored = source.tensor(name, (model.vocabulary, model.hidden))
    if source.dtype(name) == "BF16":
        return stored.reshape(-1), "bf16"
    return stored.astype(np.float32, copy=False).reshape(-1), "f32"


def _head(spec: HeadSpec | None) -> dict[str, Any]:
    return NO_GRID if spec is None else {"bits": spec.bits, "symmetric": spec.symmetric, "clip": spec.clip}


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
