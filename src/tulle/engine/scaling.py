"""A Scaling Transformer (docs/guide/scaling-transformers.md) as the native engine takes it.

Weights that a token reads row by row stay as they are, row by row: of W₁ and W₂ of a sparse feed-forward one row is
what one unit needs. Where outputs or inputs are few (the controller's second matrix, E of the multiplicative layer, the
convolutions), 16 outputs lie side by side instead ("panels"). Everything is copied into huge pages at start.

In ``int8`` the linears, W₁ and W₂ are rounded to the nearest of 255 codes with a scale per row, max|w|/127, and inputs
to 8 bits with a step per token; sums are whole numbers. Activations of W₂'s chosen rows stay floats. What decides or
mixes is small and stays in bfloat16: controller, multiplicative layer, convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.engine.checkpoint import Checkpoint
from tulle.engine.files import ALIGNMENT, huge
from tulle.engine.mixers import rotary_frequencies
from tulle.engine.native_model import (
    Convolution,
    Matrix,
    Multiplicative,
    Panels,
    Projection,
    ScalingLayer,
    ScalingModel,
    WeightKind,
)
from tulle.engine.prepare import Progress
from tulle.errors import UserError
from tulle.format.pack import bf16_to_f32, f32_to_bf16
from tulle.models.config_keys import ConfigKeys
from tulle.models.families._parts import read_rotary
from tulle.models.source import require_finite, same_numbers

MODEL_TYPE = "scaling_transformer"
WEIGHTS = ("as stored", "f32", "bf16", "int8")
PANEL = 16
LARGEST = 1 << 24
"""Of any size in a configuration."""
CODE_INPUTS = 1 << 16
"""Inputs of a row of codes, at most: beyond, sums might leave 32 bits."""
BLOCK = 1 << 26
"""Bytes of one allocation of huge pages."""
HEADS = ("int8", "bf16", "as stored")
PART = 1 << 22
"""Numbers that are rounded at once."""
TYPES = {WeightKind.F32: np.float32, WeightKind.BF16: np.uint16, WeightKind.CODES8: np.uint8}


class Arena:
    """Arrays in huge pages, each at a multiple of 64 bytes."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if len(self._free) < size:
            self._free = huge(max(size, BLOCK))
        found = self._free[:size].view(dtype).reshape(shape)
        self._free = self._free[size + -size % ALIGNMENT :]
        return found


class Weights:
    """Tensors of a checkpoint in the forms of the kernels."""

    def __init__(self, source: Checkpoint, weights: str):
        self._source, self._weights, self._arena = source, weights, Arena()
        self.small = "bf16" if weights == "int8" else weights
        """Of what decides or mixes."""

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        found = self._source.floats(name, (size,))
        require_finite(name, found, "F32")
        return found

    def bias(self, name: str, size: int) -> NDArray[np.float32] | None:
        return self.vector(name, size) if name in self._source else None

    def matrix(self, name: str, shape: tuple[int, int], weights: str | None = None) -> Matrix:
        """Row by row."""
        weights = weights or self._weights
        stored = self._source.tensor(name, shape)
        kind = WeightKind.CODES8 if weights == "int8" else self._kind(name, weights)
        if kind is WeightKind.CODES8 and shape[1] > CODE_INPUTS:
            raise UserError(f"expected at most {CODE_INPUTS} inputs for int8, found {shape[1]} in {name}; try bf16")
        values = self._arena.empty(shape, TYPES[kind])
        scales = self._arena.empty(shape[:1], np.float32) if kind is WeightKind.CODES8 else None
        require_finite(name, stored, self._source.dtype(name))
        rows = max(1, PART // shape[1])
        bits = self._source.dtype(name) == "BF16"
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            if scales is None:
                values[part] = _converted(stored[part], bits, kind)
            else:
                values[part], scales[part] = quantised(_converted(stored[part], bits, WeightKind.F32), name)
        return Matrix(kind, shape[0], shape[1], values.reshape(-1), scales)

    def panels(self, name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Panels:
        """B ``[inputs, outputs]``: the tensor with its axes in this order, outputs last."""
        kind = self._kind(name, self.small)
        stored = self._source.tensor(name, shape).transpose(axes)
        require_finite(name, stored, self._source.dtype(name))
        outputs = stored.shape[-1]
        table = _converted(stored, self._source.dtype(name) == "BF16", kind).reshape(-1, outputs)
        count = -(-outputs // PANEL)
        values = self._arena.empty((count, len(table), PANEL), TYPES[kind])
        for number in range(count):
            part = table[:, number * PANEL : (number + 1) * PANEL]
            values[number, :, : part.shape[1]] = part
        return Panels(kind, len(table), outputs, values.reshape(-1))

    def multiplicative(self, name: str, inputs: int, outputs: int, modules: int) -> Multiplicative:
        d = self.matrix(f"{name}.d", (modules, inputs), self.small)
        e = self.panels(f"{name}.e", (outputs // modules, inputs), (1, 0))
        return Multiplicative(d, e, self.bias(f"{name}.bias", outputs))

    def _kind(self, name: str, weights: str) -> WeightKind:
        """f32 or bf16."""
        if weights == "as stored":
            return WeightKind.BF16 if self._source.dtype(name) == "BF16" else WeightKind.F32
        return WeightKind(weights)


def _converted(stored: NDArray[Any], bits: bool, kind: WeightKind) -> NDArray[Any]:
    """``bits``: what is stored are those of bfloat16."""
    if kind is WeightKind.BF16:
        return stored if bits else f32_to_bf16(stored.astype(np.float32))
    return bf16_to_f32(stored) if bits else stored.astype(np.float32, copy=False)


def quantised(rows: NDArray[np.float32], name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes ``[R, C]`` and scales ``[R]`` with w ≈ scale·(code − 128), nearest. Raises ``UserError`` for NaN or Inf."""
    most = np.abs(rows).max(axis=1)
    if not np.isfinite(most).all():
        raise UserError(f"expected finite numbers in {name}, found others; the checkpoint is broken")
    scales = np.where(most > 0, most / np.float32(127), np.float32(1))
    # The scale of a row of denormal numbers may be zero.
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    codes = np.rint(rows / scales[:, None]).clip(-127, 127) + 128
    return codes.astype(np.uint8), scales


class Shape:
    """The sizes in a configuration. Raises ``UserError`` for what does not fit together."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self.hidden = self._size("hidden_size")
        self.intermediate = self._size("intermediate_size")
        self.layers = self._size("num_hidden_layers")
        self.heads = self._size("num_attention_heads")
        self.vocabulary = self._size("vocab_size")
        self.block = self._optional("ff_block")
        self.modules = self._optional("qkv_modules")
        self.loss_modules = self._optional("loss_modules")
        self.rank = self._optional("ff_lowrank") or max(1, self.hidden // (self.block or 1))
        for name, size, divisor in (
            ("hidden_size", self.hidden, self.heads),
            ("hidden_size", self.hidden, self.modules),
            ("intermediate_size", self.intermediate, self.block),
            ("vocab_size", self.vocabulary, self.loss_modules),
        ):
            if divisor and size % divisor:
                raise UserError(f"expected {name} to be a multiple of {divisor}, found {size}; config.json is damaged")
        self.head_dim = self.hidden // self.heads
        self.tied = bool(config.get("tie_word_embeddings", True)) and not self.loss_modules
        positions = config.get("position_embedding", "rope")
        if positions not in ("rope", "none"):
            raise UserError(f"expected position_embedding rope or none, found {positions!r}")
        self.rope = positions == "rope"
        if self.rope and self.head_dim % 2:
            raise UserError(f"expected an even head size for RoPE, found {self.head_dim}")

    def _size(self, name: str) -> int:
        found = self._config.get(name)
        if type(found) is not int or not 1 <= found <= LARGEST:
            raise UserError(f"expected {name} from 1 to {LARGEST} in config.json, found {found!r}")
        return found

    def _optional(self, name: str) -> int:
        """0: none."""
        return 0 if self._config.get(name) is None else self._size(name)


def settings_of(
    source: Checkpoint, weights: str, head: str, progress: Progress | None = None
) -> tuple[Shape, ScalingModel]:
    """Sizes, and the model as ``_native.ScalingEngine`` takes it.

    ``weights``: as stored, f32, bf16 or int8; ``head``: int8, bf16 or as stored, of a dense head (with the exact rows
    beside int8). Raises ``UserError`` for a checkpoint that is broken.
    """
    if weights not in WEIGHTS:
        raise UserError(f"expected weights {', '.join(WEIGHTS)}, found {weights!r}")
    if head not in HEADS:
        raise UserError(f"expected a head of {', '.join(HEADS)}, found {head!r}")
    if source.config.get("quantization_config") is not None:
        raise UserError(
            "expected a Scaling Transformer as it was trained, found quantization_config; the engine rounds its "
            "weights itself, with --weights int8"
        )
    shape, made = Shape(source.config), Weights(source, weights)
    frequencies = _frequencies(source.config, shape.head_dim) if shape.rope else []
    layers = []
    for index in range(shape.layers):
        if progress:
            progress("load", index, shape.layers)
        layers.append(_layer(made, shape, f"model.layers.{index}."))
    table = "model.embed_tokens.weight"
    if shape.tied and table not in source:
        table = "lm_head.weight"
    elif shape.tied and "lm_head.weight" in source and not same_numbers(source.source, table, "lm_head.weight"):
        shape.tied = False  # as transformers does
    as_stored = "as stored"
    size = (shape.vocabulary, shape.hidden)
    embedding = made.matrix(table, size, as_stored)
    exact: Matrix | None = None
    output: Matrix | Multiplicative
    if shape.loss_modules:
        output = made.multiplicative("lm_head", shape.hidden, shape.vocabulary, shape.loss_modules)
    else:
        output = embedding if shape.tied else made.matrix("lm_head.weight", size, as_stored)
        if head != as_stored:
            exact = output if head == "int8" else None
            output = made.matrix(table if shape.tied else "lm_head.weight", size, head)
    return shape, ScalingModel(
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        vocabulary=shape.vocabulary,
        modules=shape.modules,
        block=shape.block,
        loss_modules=shape.loss_modules,
        eps=_number(source.config, "rms_norm_eps", 1e-6),
        inverse_frequencies=frequencies,
        embedding=embedding,
        layers=layers,
        norm=made.vector("model.norm.weight", shape.hidden),
        head=output,
        exact_head=exact,
    )


def _layer(made: Weights, shape: Shape, prefix: str) -> ScalingLayer:
    d, d_ff, attention, mlp = shape.hidden, shape.intermediate, f"{prefix}self_attn.", f"{prefix}mlp."
    sparse = shape.block > 0
    suffix = "" if sparse else ".weight"
    w2_bias = made.vector(f"{mlp}b2", d) if sparse else made.bias(f"{mlp}w2.bias", d)
    found = ScalingLayer(
        input_norm=made.vector(f"{prefix}input_layernorm.weight", d),
        post_norm=made.vector(f"{prefix}post_attention_layernorm.weight", d),
        w1=Projection(made.matrix(f"{mlp}w1{suffix}", (d_ff, d))),
        w2=Projection(made.matrix(f"{mlp}w2{suffix}", (d_ff, d) if sparse else (d, d_ff)), w2_bias),
    )
    if sparse:
        controller = f"{mlp}controller."
        found.c1 = made.matrix(f"{controller}c1.weight", (shape.rank, d), made.small)
        found.c2 = made.panels(f"{controller}c2.weight", (d_ff, shape.rank), (1, 0))
        found.c2_bias = made.vector(f"{controller}c2.bias", d_ff)
    if shape.modules:
        found.multiplicative = made.multiplicative(f"{attention}multiplicative", d, d, shape.modules)
        size = d // shape.modules

        def convolution(part: str, width: int) -> Convolution:
            name = f"{attention}{part}_conv"
            # Stored as [out, in, length, modules].
            weight = made.panels(f"{name}.weight", (size, size, 3, width), (2, 3, 1, 0))
            return Convolution(weight, made.bias(f"{name}.bias", size))

        found.q_conv, found.k_conv, found.v_conv = convolution("q", 3), convolution("k", 3), convolution("v", 1)
    else:

        def projection(part: str) -> Projection:
            name = f"{attention}{part}_proj"
            return Projection(made.matrix(f"{name}.weight", (d, d)), made.bias(f"{name}.bias", d))

        found.q, found.k, found.v, found.o = (projection(part) for part in "qkvo")
    return found


def _frequencies(config: Mapping[str, Any], head_dim: int) -> list[float]:
    keys = ConfigKeys(config)
    rotary = read_rotary(keys, head_dim, keys.size("max_position_embeddings", 2048))
    if rotary.kind != "default":
        raise UserError(f"expected rope_type default for a Scaling Transformer, found {rotary.kind!r}")
    inverse, _ = rotary_frequencies(rotary, rotary.max_positions)
    return [float(x) for x in inverse]


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    found = config.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1:
        raise UserError(f"expected {name} of at least 0 and below 1 in config.json, found {found!r}")
    return float(found)
