"""What mixes tokens in a layer, as the native engine takes it: all but the first and the last linears. Norms, too, and
rotary tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.engine.checkpoint import Source
from tulle.engine.linears import Linears, names_of
from tulle.engine.native_model import CausalConvolution, DeltaNet, Floats, RotaryTable
from tulle.engine.native_model import LatentAttention as NativeLatentAttention
from tulle.engine.native_model import Mamba2 as NativeMamba2
from tulle.engine.native_model import Norm as NativeNorm
from tulle.engine.native_model import ShortConvolution as NativeShortConvolution
from tulle.errors import UserError
from tulle.models.description import Attention, GatedDeltaNet, LatentAttention, Mamba2, Norm, Rotary, ShortConvolution
from tulle.models.description import Layer as DecoderLayer
from tulle.models.rotary import depends_on_length, frequencies


def latent_attention(
    source: Source, linears: Linears, layer: DecoderLayer, mixer: LatentAttention
) -> NativeLatentAttention:
    query_norm = norm_of(source, mixer.query_norm, layer.prefix, mixer.query_rank or 0)
    norm = norm_of(source, mixer.kv_norm, layer.prefix, mixer.kv_rank)
    assert norm is not None
    (name,) = names_of(layer, "kv_up")
    absorbs = name in source.absorbed
    return NativeLatentAttention(
        query_rank=mixer.query_rank or 0,
        rank=mixer.kv_rank,
        plain=mixer.plain_dim,
        rotary=mixer.rotary_dim,
        value=mixer.value_dim,
        query_norm=query_norm,
        norm=norm,
        query_up=None if mixer.query_rank is None else linears.group(names_of(layer, "q_up")),
        kv_up=None if absorbs else linears.group([name]),
        absorbed=linears.absorbed(name, mixer) if absorbs else None,
    )


def attention_parts(source: Source, mixer: Attention, prefix: str) -> dict[str, Any]:
    """What attention has besides linears and norms with gains."""
    ones = np.ones(mixer.head_dim, np.float32)
    return {
        "kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "kv_from": -1 if mixer.kv_from is None else mixer.kv_from,
        "value_is_key": mixer.value_is_key,
        "value_norm": None if mixer.value_eps is None else NativeNorm(ones, None, mixer.value_eps, False),
        "window": mixer.window or 0,
        "sinks": _sinks(source, mixer, prefix),
    }


def _sinks(source: Source, mixer: Attention, prefix: str) -> Floats | None:
    if not mixer.sinks:
        return None
    return np.ascontiguousarray(source.floats(f"{prefix}{mixer.name}.sinks", (mixer.heads,)))


def head_norms(mixer: Attention) -> dict[str, tuple[Norm | None, int]]:
    """Of queries, keys and outputs, with their widths."""
    queries, keys, _ = mixer.widths if mixer.norm_width == "all" else (mixer.head_dim,) * 3
    return {
        "query_norm": (mixer.q_norm, queries),
        "key_norm": (mixer.k_norm, keys),
        "output_norm": (mixer.output_norm, mixer.widths[0]),
    }


def recurrent(
    source: Source, mixer: GatedDeltaNet | ShortConvolution | Mamba2, prefix: str
) -> DeltaNet | NativeShortConvolution | NativeMamba2:
    """What a mixer has beside its linears."""
    own = {
        name.removeprefix(f"{mixer.name}."): source.floats(prefix + name, shape)
        for name, shape in mixer.parameters.items()
    }
    if isinstance(mixer, ShortConvolution):
        return NativeShortConvolution(_convolution(own, "conv", silu=False))
    convolution = _convolution(own, "conv1d", silu=True)
    decay, step_bias = -np.exp(own["A_log"]), np.ascontiguousarray(own["dt_bias"])
    norm = NativeNorm(np.ascontiguousarray(own["norm.weight"]), None, mixer.eps, False)
    if isinstance(mixer, Mamba2):
        least, most = mixer.step_limits
        return NativeMamba2(
            heads=mixer.heads,
            head_dim=mixer.head_dim,
            groups=mixer.groups,
            state=mixer.state,
            convolution=convolution,
            decay=decay,
            step_bias=step_bias,
            skip=np.ascontiguousarray(own["D"]),
            least=least,
            most=most,
            norm=norm,
        )
    return DeltaNet(
        key_heads=mixer.key_heads,
        value_heads=mixer.value_heads,
        key_dim=mixer.key_dim,
        value_dim=mixer.value_dim,
        convolution=convolution,
        decay=decay,
        step_bias=step_bias,
        norm=norm,
    )


def _convolution(own: Mapping[str, Floats], name: str, silu: bool) -> CausalConvolution:
    taps, bias = own[f"{name}.weight"][:, 0], own.get(f"{name}.bias")
    return CausalConvolution(
        channels=len(taps),
        kernel=taps.shape[1],
        taps=np.ascontiguousarray(taps.T).reshape(-1),
        bias=None if bias is None else np.ascontiguousarray(bias),
        silu=silu,
    )


def norm_of(source: Source, norm: Norm | None, prefix: str, size: int) -> NativeNorm | None:
    """A norm, its offset added to the gain."""
    if norm is None:
        return None
    name = prefix + norm.name
    gain = source.floats(f"{name}.weight", (size,)) + np.float32(norm.offset)
    bias = source.floats(f"{name}.bias", (size,)) if norm.bias else None
    return NativeNorm(np.ascontiguousarray(gain), bias, norm.eps, norm.kind == "layer")


def rotary_table(table: Rotary, context: int) -> RotaryTable:
    inverse, scale = rotary_frequencies(table, context)
    return RotaryTable(inverse.tolist(), scale, table.interleaved)


def rotary_frequencies(rotary: Rotary, context: int = 1) -> tuple[NDArray[np.float32], float]:
    """Frequencies ``[dim/2]`` for texts of up to ``context`` tokens, and the factor on cosines and sines.

    Of longrope, all texts have the long factors where some may be longer than those of the first training: one that
    grows beyond that length keeps its keys. Raises ``UserError`` for another table that differs between short and long
    texts."""
    if rotary.kind == "longrope":
        return frequencies(rotary, context)
    found = frequencies(rotary, 1)
    if depends_on_length(rotary) and not np.array_equal(found[0], frequencies(rotary, context)[0]):
        raise UserError(
            f"expected a context of at most {rotary.max_positions} tokens, beyond which rope_type {rotary.kind!r} "
            f"changes all positions, found {context}; set a shorter --context, or evaluate with --backend torch"
        )
    return found
