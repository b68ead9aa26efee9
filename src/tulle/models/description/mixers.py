"""What mixes tokens in a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tulle.models.description.parts import (
    Absent,
    Norm,
)


@dataclass(frozen=True)
class Attention:
    """Softmax attention. Query heads come in equal groups, each of which shares one KV head."""

    heads: int
    kv_heads: int
    head_dim: int
    name: str = "self_attn"
    """Relative name of the module."""
    rotary: str | None = "default"
    """Name of a table of ``Decoder.rotary``, or None: queries and keys know no position."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    """Of queries and keys; see ``norm_width`` and ``norm_after_rotary``."""
    norm_width: Literal["head", "all"] = "head"
    """Whether they go over every head's ``head_dim`` channels or over those of all heads at once."""
    norm_after_rotary: bool = False
    """Whether they come after the rotation."""
    window: int | None = None
    """A token sees itself and the ``window`` − 1 tokens before it; None: all."""
    scale: float | None = None
    """Of q·k; None: 1/√head_dim."""
    soft_cap: float | None = None
    """c of scores c·tanh(s/c)."""
    sinks: bool = False
    """A learned score per head that takes part in the softmax and has no value."""
    output_gate: bool = False
    """Every query head is followed by as many channels whose sigmoid multiplies its output."""
    output_norm: Norm | None = None
    """Of all heads' outputs at once, before the output linear."""
    position_scale: tuple[float, int] | None = None
    """(β, n): a query at position p is multiplied by 1 + β·ln(1 + ⌊p/n⌋)."""
    kv_from: int | None = None
    """An earlier layer whose keys and values are attended to, as they are after norm and rotation; None: its own."""
    value_is_key: bool = False
    """The key linear gives the values, too: there is no other for them."""
    value_eps: float | None = None
    """A head's values v become v/√(mean v² + ε); None: they stay as they are."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears and norms, with their shapes, by relative name."""
        return {f"{self.name}.sinks": (self.heads,)} if self.sinks else {}

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of all queries, all keys, all values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def norms(self) -> list[tuple[Norm, int]]:
        """Its norms with their widths."""
        wide = self.norm_width == "all"
        widths = self.widths if wide else (self.head_dim,) * 3
        found = [(self.q_norm, widths[0]), (self.k_norm, widths[1]), (self.output_norm, self.widths[0])]
        return [(norm, width) for norm, width in found if norm is not None]

    def query_heads(self, kv_head: int) -> range:
        """The query heads that share a KV head."""
        shared = self.heads // self.kv_heads
        return range(kv_head * shared, (kv_head + 1) * shared)


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values come of a narrow vector per token, which is what a cache has to keep, beside a
    part of the key that knows the position and that all heads share (DeepSeek-V2, 2024, section 2.1).

    Queries, too, come of a narrow vector, unless ``query_rank`` is None. Of a head's channels of queries and keys the
    last ``rotary_dim`` are rotated.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    plain_dim: int
    """Channels of a head's queries and keys that know no position."""
    rotary_dim: int
    value_dim: int
    scale: float
    """Of q·k."""
    query_norm: Norm | None
    """Of the narrow vectors."""
    kv_norm: Norm
    name: str = "self_attn"
    rotary: str | None = "default"

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {}

    def norms(self) -> list[tuple[Norm, int]]:
        own = [(self.kv_norm, self.kv_rank)]
        return own if self.query_norm is None else [(self.query_norm, self.query_rank or 0), *own]


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention by the gated delta rule (:mod:`tulle.core.delta_rule`).

    A causal convolution of ``kernel`` tokens runs over queries, keys and values; heads of queries and keys are of unit
    length; β = σ(b), g = −e^A·softplus(a + δ). Outputs are normed head by head and gated by silu(z).
    """

    key_heads: int
    value_heads: int
    """A multiple of ``key_heads``, equal groups of which share one."""
    key_dim: int
    value_dim: int
    """Channels of a head."""
    kernel: int
    eps: float
    activation: str = "silu"
    """Behind the convolution."""
    fused: bool = False
    """Whether two linears, ``in_proj_qkvz`` and ``in_proj_ba``, give all inputs, one key head's after the other's:
    queries, keys, values and z; b and a."""
    name: str = "linear_attn"
    rotary: None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of all queries, all keys, all values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        shapes: dict[str, tuple[int, ...]] = {
            "conv1d.weight": (sum(self.widths), 1, self.kernel),
            "dt_bias": (self.value_heads,),
            "A_log": (self.value_heads,),
            "norm.weight": (self.value_dim,),
        }
        return {f"{self.name}.{name}": shape for name, shape in shapes.items()}

    def norms(self) -> list[tuple[Norm, int]]:
        return []


def _convolution(name: str, channels: int, kernel: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of a convolution along the tokens that keeps channels apart."""
    return {f"{name}.weight": (channels, 1, kernel), **({f"{name}.bias": (channels,)} if bias else {})}


@dataclass(frozen=True)
class ShortConvolution:
    """Gated short convolution (Liquid AI 2025, "LFM2 Technical Report"): of the parts B, C and x that one linear gives,
    C ⊙ conv(B ⊙ x), the convolution being causal, of ``kernel`` tokens and channel by channel."""

    channels: int
    kernel: int
    bias: bool = False
    """Of the convolution and of the linears."""
    name: str = "conv"
    rotary: None = None

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        return _convolution(f"{self.name}.conv", self.channels, self.kernel, self.bias)

    def norms(self) -> list[tuple[Norm, int]]:
        return []


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2's mixer (Dao & Gu 2024, section 7; :mod:`tulle.core.state_space`).

    One linear gives a gate z, x, B and C, and a step Δ per head. A causal convolution of ``kernel`` tokens runs over x,
    B and C; Δ = softplus(Δ + δ) within ``step_limits``. A head's state forgets by e^{−e^A·Δ} and takes in B·(Δ·x)ᵀ; to
    what C reads of it D·x is added. Outputs, gated by silu(z), are normed in ``groups`` equal parts.
    """

    heads: int
    head_dim: int
    """Channels of x per head."""
    groups: int
    """Of heads, each of which shares B and C."""
    state: int
    """Channels of B and of C per group."""
    kernel: int
    eps: float
    activation: str = "silu"
    """Behind the convolution."""
    bias: bool = False
    """Of the linears."""
    convolution_bias: bool = True
    step_limits: tuple[float, float] = (0.0, math.inf)
    name: str = "mamba"
    rotary: None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x, of all B, of all C."""
        shared = self.groups * self.state
        return self.heads * self.head_dim, shared, shared

    @property
    def outputs(self) -> tuple[int, int, int]:
        """Of the first linear: z; x, B and C; Δ."""
        return self.widths[0], sum(self.widths), self.heads

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        per_head = {f"{self.name}.{name}": (self.heads,) for name in ("dt_bias", "A_log", "D")}
        convolution = _convolution(f"{self.name}.conv1d", self.outputs[1], self.kernel, self.convolution_bias)
        return {**convolution, **per_head, f"{self.name}.norm.weight": self.widths[:1]}

    def norms(self) -> list[tuple[Norm, int]]:
        return []


Mixer = Attention | LatentAttention | GatedDeltaNet | ShortConvolution | Mamba2 | Absent
"""What mixes tokens in a layer."""
