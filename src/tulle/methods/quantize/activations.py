"""Quantised inputs: every token is put on an integer grid of its own, found from the token at run time.

The activation side of W4A4, W6A6 and W8A8 (ZeroQuant, Yao et al. 2022; the settings of DuQuant and QuaRot: 4 bits,
asymmetric or symmetric, clip 0.9). The grid stands behind whatever transforms the input, and the statistics that the
weights are fitted on are those of the rounded inputs. :mod:`tulle.core.token_grid` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tulle.core.token_grid import TokenGrid
from tulle.methods.contract import BlockState, Decision, Method, Stage


@dataclass(frozen=True)
class Activations(Method):
    """Rounds the inputs of linears per token to ``bits``."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    settles: ClassVar[frozenset[Decision]] = frozenset({"inputs"})

    bits: int = 4
    """Bits of an input's code, 2 to 8."""
    symmetric: bool = False
    """True: codes lie around 0; false: every token has a zero point of its own."""
    clip: float = 1.0
    """The range of a token is multiplied by this ratio before it is divided into steps."""

    def __post_init__(self) -> None:
        self._grid()

    def _grid(self) -> TokenGrid:
        return TokenGrid(self.bits, self.symmetric, self.clip)

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for linear in block.linears(roles):
            linear.input_grid = self._grid()
