"""What mixers and feed-forwards are made of: norms, rotary tables, linears, and groups of them that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from tulle.errors import UserError

NormKind = Literal["rms", "layer"]
ROLES = ("qkv", "o", "gate_up", "down")
"""Roles of linear groups that a recipe's steps can target, in the order in which they run."""
TARGETS = {"q_up": "qkv", "kv_up": "qkv", "input_gate": "gate_up", "input_down": "down"}
"""Further roles, of latent attention and of a layer's own inputs, and what of ROLES a recipe names to reach them."""
STREAM_READERS = ("qkv", "router", "gate_up", "input_gate")
"""Roles that read the residual stream, through a norm where there is one."""
TABLES = ("embedding", "head")
"""Roles outside the blocks, which a step has only where it names them. A tied model has one table for both."""
RotaryKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""``hidden_act`` of a config → the function's one name here. Several spellings of transformers are one function."""


@dataclass(frozen=True)
class Norm:
    """A norm; its width is that of what it is applied to.

    rms: x/√(mean x² + ``eps``) · (``offset`` + w). layer: (x − mean)/√(var + ``eps``) · (``offset`` + w) + b.
    """

    name: str
    eps: float
    kind: NormKind = "rms"
    offset: float = 0.0
    bias: bool = False

    def names(self) -> list[str]:
        """Of its tensors."""
        return [f"{self.name}.weight", *([f"{self.name}.bias"] if self.bias else [])]

    def tensors(self, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (width,)}
        if self.bias:
            shapes[f"{self.name}.bias"] = (width,)
        return shapes


@dataclass(frozen=True)
class Rotary:
    """A table of rotary position embeddings; ``tulle.models.rotary`` computes it.

    The first ``dim`` channels of a head are rotated, channel i together with channel i + dim/2, or, ``interleaved``,
    channel 2i together with 2i + 1. Fields that a kind does not use stay at their defaults.
    """

    dim: int
    theta: float
    kind: RotaryKind = "default"
    max_positions: int = 0
    """Positions that the model is said to support (``max_position_embeddings``)."""
    factor: float | None = None
    """Of stretching; None for yarn and longrope: ``max_positions``/``original_max_positions``."""
    original_max_positions: int | None = None
    """Positions of the first training; yarn, longrope, llama3."""
    attention_factor: float | None = None
    """Of cosines and sines, for yarn and longrope; None: what the paper suggests for the factor."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: whether the corrected range ends at whole channels."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotated: float = 1.0
    """proportional: share of the channels whose frequency is not 0."""
    interleaved: bool = False


@dataclass(frozen=True)
class Linear:
    """y = x·Wᵀ (+ b), W of ``shape`` ``(C_out, C_in)``, stored under ``name`` + ``.weight`` (and ``.bias``)."""

    name: str
    shape: tuple[int, int]
    bias: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.weight": self.shape}
        if self.bias:
            shapes[f"{self.name}.bias"] = self.shape[:1]
        return shapes


@dataclass(frozen=True)
class Producer:
    """Output rows ``start`` … ``stop`` − 1 of the linear ``name``: all of it, or a part of a tensor that holds several.

    ``linear``: whether what comes in between (a gate, but no norm, activation, limit or sum) lets a factor of these
    channels through.
    """

    name: str
    start: int
    stop: int
    linear: bool = True

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class _Rows(Protocol):
    """What :func:`require_plain_values` asks for."""

    @property
    def linear(self) -> bool: ...


P = TypeVar("P", bound=_Rows)


def require_plain_values(producers: Sequence[P]) -> P:
    """The rows that give o's inputs. Raises ``UserError`` where they do not reach o as they are, so that the values
    cannot have another basis."""
    if producers and producers[0].linear:
        return producers[0]
    raise UserError(
        "expected values that reach o as they are, found a norm or a gate in between; leave the rotation of the values "
        "out"
    )


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one layer that read the same input."""

    role: str
    """One of ROLES or TARGETS; ``router`` for what is never compressed."""
    linears: tuple[Linear, ...]
    norm: Norm | None = None
    """Whose output they read, or None."""
    producers: tuple[Producer, ...] = ()
    """Whose output channels become their input channels (v → o; up, then gate → down)."""
    adds: bool = False
    """Whether their output is added to the residual stream, through a norm or weighted or not."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)

    @property
    def inputs(self) -> int:
        """C_in, which they share."""
        return self.linears[0].shape[1]


@dataclass(frozen=True)
class Expert:
    """One of a layer's experts."""

    index: int
    groups: tuple[LinearGroup, LinearGroup]
    """``gate_up`` and ``down``."""

    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group.linears]


def target_of(role: str) -> str:
    """What a recipe names, of ROLES, to reach a group of this role."""
    return TARGETS.get(role, role)


def expert_role(role: str) -> str:
    """The role of an expert's group, where the shared expert's must be told apart from it."""
    return f"{role} of experts"


@dataclass(frozen=True)
class Absent:
    """The part that a layer does not have where it is a mixer or a feed-forward alone (Nemotron-H)."""

    name: str = ""
    rotary: None = None
    inner_norm: None = None
    intermediate: int = 0
    activation: str = "silu"

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {}

    def norms(self) -> list[tuple[Norm, int]]:
        return []
