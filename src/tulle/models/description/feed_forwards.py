"""What a layer does to every token by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tulle.models.description.parts import (
    Absent,
    Linear,
    Norm,
)


@dataclass(frozen=True)
class GatedMLP:
    """down(f(gate(x)) ⊙ up(x)), f of :data:`ACTIVATIONS`' values. A single linear of twice the width gives gate and
    up one after the other."""

    intermediate: int
    activation: str
    name: str = "mlp"
    inner_norm: Norm | None = None
    """Before down."""
    up_offset: float = 0.0
    """Added to up(x)."""
    limit: float | None = None
    """gate(x) is at most this, and up(x) at most this far from 0."""


@dataclass(frozen=True)
class PlainMLP:
    """down(f(up(x))), f of :data:`ACTIVATIONS`' values. xielu has two numbers of its own (``parameters``)."""

    intermediate: int
    activation: str
    name: str = "mlp"
    inner_norm: None = None

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        if self.activation != "xielu":
            return {}
        return {f"{self.name}.act_fn.{name}": shape for name, shape in XIELU.items()}


@dataclass(frozen=True)
class Router:
    """Gives every token ``chosen`` of ``experts`` experts, by the outputs of ``linear``
    (:func:`tulle.models.routing.choose`)."""

    linear: Linear
    experts: int
    chosen: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Of the outputs."""
    normalise: bool = False
    """Whether a token's weights are made to sum to 1."""
    scale: float = 1.0
    """Of the weights."""
    correction: str | None = None
    """Relative name of a tensor ``[experts]`` that is added to the scores for choosing."""
    input_scale: str | None = None
    """Relative name of a tensor ``[d]``, s: the linear reads x/√(mean x² + ``input_eps``)·s/√d of the stream x."""
    input_eps: float = 0.0
    expert_scale: str | None = None
    """Relative name of a tensor ``[experts]`` that the chosen experts' weights are multiplied by."""
    groups: int = 1
    """Equal groups of experts, of which ``chosen_groups`` are eligible, by the sum of their ``group_best`` best."""
    chosen_groups: int = 1
    group_best: int = 1


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: Σ w_e·expert_e(x) over a token's chosen experts e, plus what the ``shared`` expert gives
    for every token, by σ of the output of ``shared_gate`` where there is one."""

    router: Router
    expert: GatedMLP | PlainMLP
    """What all are alike in; its ``name`` is that of their list."""
    shared: GatedMLP | PlainMLP | None = None
    shared_gate: Linear | None = None
    expert_norm: Norm | None = None
    """Of the stream, for the routed experts; None: they read what the shared one reads."""
    shared_norm_after: Norm | None = None
    experts_norm_after: Norm | None = None
    """On what the shared expert gives, and on the sum of the others."""
    inner_norm: None = None

    def stream_norms(self) -> list[Norm]:
        """Norms over the channels of the residual stream."""
        return [n for n in (self.expert_norm, self.shared_norm_after, self.experts_norm_after) if n is not None]

    @property
    def intermediate(self) -> int:
        """Of an expert."""
        return self.expert.intermediate

    @property
    def activation(self) -> str:
        return self.expert.activation

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Tensors besides those of linears, with their shapes, by relative name."""
        router = self.router
        shapes: dict[str, tuple[int, ...]] = {}
        if router.input_scale is not None:
            shapes[router.input_scale] = router.linear.shape[1:]
        for name in (router.correction, router.expert_scale):
            if name is not None:
                shapes[name] = (router.experts,)
        return shapes


XIELU: dict[str, tuple[int, ...]] = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
"""xIELU's numbers (Huang & Schlag 2024, equation 6), with their shapes in a checkpoint."""
FeedForward = GatedMLP | PlainMLP | Mixture | Absent
"""What a layer does to every token by itself."""
