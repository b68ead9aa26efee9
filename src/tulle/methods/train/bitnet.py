"""BitNet b1.58: ternary weights and 8-bit inputs, trained (Ma et al. 2024, "The Era of 1-bit LLMs", equations 1-3).

    Q_w(W) = RoundClip(W/(α + ε), −1, 1),   α = mean|W|,   Ŵ = α·Q_w(W),
    Q(x) = RoundClip(127·x/(γ + ε), −127, 127),   γ = max|x| of the token,   x̂ = γ/127·Q(x).

Both gradients pass straight through: ∂L/∂W := ∂L/∂Ŵ, ∂L/∂x := ∂L/∂x̂.

Where we depart: α is rounded to bfloat16, and γ/127 is used without ε, as the file has them
(``docs/reference/format.md``, 2 bits symmetric and ``input_bits`` 8), so that
training, evaluation and the packed model are one; −128 is no code. There is no extra norm in front of the linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.grid import Grid, Quantised
from tulle.core.token_grid import TokenGrid
from tulle.methods.contract import LinearState
from tulle.methods.train.effective import StraightThrough, install, remove
from tulle.methods.train.inputs import require_unselected, transform_input, transform_inputs
from tulle.methods.train.method import TrainingMethod, local

TINY = 1e-5
"""ε of the weights' scale."""


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q_w(W) ``[C_out, C_in]`` of −1, 0 and 1, and α (no dimensions), float32, of W ``[C_out, C_in]``."""
    weight = weight.float()
    alpha = weight.abs().mean().bfloat16().float()
    return (weight / (alpha + TINY)).round().clamp(-1, 1), alpha


@torch.library.custom_op("tulle::ternary_weight", mutates_args=())
def ternary_weight(weight: Tensor) -> Tensor:
    """Ŵ ``[C_out, C_in]`` (equation 1) in the dtype of W.

    One opaque operator: a compiler that fuses it leaves out the rounding of α to bfloat16.
    """
    codes, alpha = ternary(weight)
    return (codes * alpha).to(weight.dtype)


@ternary_weight.register_fake
def _(weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


def quantised(weight: Tensor) -> Quantised:
    """The 2-bit grid of a ternary Ŵ ``[C_out, C_in]``: codes ``[C_out, C_in]``, and the one scale as ``[C_out, 1]``."""
    scale = weight.abs().max().clamp(min=torch.finfo(torch.bfloat16).tiny).expand(weight.shape[0], 1).clone()
    codes = (weight / scale).round().to(torch.int16)
    return Quantised(Grid(bits=2), codes, scale, torch.zeros_like(scale))


@dataclass(eq=False)
class BitNet(TrainingMethod):
    """Trains with ternary weights and rounded inputs. Settings as in the equations above."""

    sharded: ClassVar[bool] = False  # α is a mean over the whole matrix
    settles: ClassVar[frozenset[str]] = frozenset({"forward"})

    input_bits: int | None = 8
    """Of Q(x); null leaves the inputs as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid = None if self.input_bits is None else TokenGrid(self.input_bits)

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        super().prepare(model, steps, linears)
        for linear in self.linears.values():
            install(linear, _straight)
        if self.grid is not None:
            require_unselected(model, "bitnet")
            if linears is None:
                transform_inputs(model, dict.fromkeys(self.targets, self._round))
            else:
                for linear in linears.values():
                    transform_input(linear, self._round)

    def _round(self, x: Tensor) -> Tensor:
        assert self.grid is not None
        found: Tensor = StraightThrough.apply(x, self.grid.fake(x.detach()))
        return found

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """``ternary_zeros``: fraction of weights that are zero."""
        zeros = sum(int((ternary(local(linear.weight))[0] == 0).sum()) for linear in self.linears.values())
        return {"ternary_zeros": zeros / max(sum(local(x.weight).numel() for x in self.linears.values()), 1)}

    @torch.no_grad()
    def finish(self) -> None:
        """The weights become Ŵ; inputs stay rounded."""
        for linear in self.linears.values():
            remove(linear)
            linear.weight.copy_(ternary_weight(linear.weight))

    def describe(self, linears: Mapping[str, LinearState]) -> None:
        for name in self.linears:
            state = linears[name]
            state.quantised, state.input_grid = quantised(state.weight), self.grid


def _straight(weight: Tensor) -> Tensor:
    found: Tensor = StraightThrough.apply(weight, ternary_weight(weight.detach()))
    return found
