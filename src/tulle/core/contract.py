"""What the block walker hands to a method, and what it wants back.

The loop belongs to the walker, the formula to the method: a method sees one *group* of linears that share
an input (``q/k/v``, ``o``, ``gate/up``, ``down``), with the statistics of that input, and changes the state of
its linears. Notation as in the papers: X ``[T, C_in]`` tokens, W ``[C_out, C_in]``, Y = X·Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from tulle.core.grid import Quantised
from tulle.core.hessian import Hessian

Statistic = Literal["hessian", "column_norm", "absmax"]


@dataclass
class Statistics:
    """Running statistics of the input X ``[T, C_in]`` of one group, over all calibration tokens.

    Only what the recipe's steps ask for is collected; the rest is ``None``.
    """

    tokens: int = 0
    hessian: Hessian | None = None
    """H = 2·XᵀX/T, ``[C_in, C_in]``, with its cached factorisations."""
    column_norm: Tensor | None = None
    """‖X_j‖₂ over the tokens, ``[C_in]``."""
    absmax: Tensor | None = None
    """max|X_j|, ``[C_in]``."""


@dataclass
class LinearState:
    """One linear while the recipe's steps are applied to it.

    ``weight`` is always the effective float32 weight, i.e. exactly what would be written now. A pruning method sets
    ``mask`` and zeroes ``weight`` outside it; a quantiser keeps the mask it finds, sets ``quantised`` and replaces
    ``weight`` by the dequantised values.
    """

    name: str
    """Module path, e.g. ``model.layers.0.mlp.down_proj``."""
    weight: Tensor
    """``[C_out, C_in]`` float32."""
    dense: Tensor
    """The checkpoint's own weight, ``[C_out, C_in]``; never changed."""
    role: str = ""
    mask: Tensor | None = None
    """bool ``[C_out, C_in]``, True = kept."""
    pattern: str | None = None
    """``"N:M"`` when the mask has that structure along the input channels."""
    quantised: Quantised | None = None
    input_bits: int | None = None
    """Bits of the per-token symmetric dynamic quantiser in front of the linear; None = unquantised input."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report, e.g. an escalated damping."""


@dataclass
class GroupState:
    """A row of the anatomy: the linears that share one input."""

    role: str
    linears: list[LinearState]
    statistics: Statistics
    block: nn.Module
    """The decoder block the group belongs to, for methods that fold something into norms or producers."""


class Method:
    """Base of every recipe step.

    Subclasses are frozen dataclasses of settings. They state which statistics they need and implement
    :meth:`apply_linear`; a method that acts on a whole group (smoothing, rotation, permutation) overrides
    :meth:`apply`. ``validate`` is called once per linear before the run starts, with its shape, so that a setting that
    cannot work (group size, N:M) is refused before any time is spent.
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def apply(self, group: GroupState) -> None:
        for linear in group.linears:
            self.apply_linear(linear, group.statistics)

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        raise NotImplementedError

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        """Raises ``UserError`` when the settings do not fit a weight of this shape."""


Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: called by long work; the command line draws it."""
