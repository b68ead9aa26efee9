"""SpinQuant: Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations".

As QuaRot, but the rotation R of the residual stream is learned on the manifold of orthogonal matrices by Cayley SGD
(section 3.2; Li et al. 2020): with G the gradient,

    Y = G·Rᵀ − R·Gᵀ (skew),  R ← (I + η/2·Y)⁻¹·(I − η/2·Y)·R

which stays orthogonal. R starts as a randomised Hadamard matrix.

Departure: the authors minimise the cross-entropy of the whole quantised network. Here R minimises the sum of the output
errors of every linear that reads the stream, block by block on sampled tokens, rounded activations and weights against
full precision: memory of one block, no graph through the network. v/o, down and Q/K are QuaRot's (steps ``quarot:
{residual: false}`` and ``kv_cache``).

Models with experts are refused: every step rounds all linears that read the stream of a block, and would read all of
its experts from the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.grid import Grid, extremes
from tulle.core.hadamard import hadamard_transform
from tulle.core.paley import hadamard_block
from tulle.core.token_grid import TokenGrid
from tulle.core.transform import BlockMatrix
from tulle.errors import UserError
from tulle.methods.contract import Method, Stage, Statistic, Survey, gain
from tulle.methods.learning import fake_quantise, fake_tokens


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The next R ``[d, d]`` from R and the gradient of the loss in R; orthogonal if R is. All float64."""
    skew = gradient @ rotation.T
    skew = skew - skew.T
    skew = skew / skew.norm().clamp(min=1e-12)
    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.solve(identity + rate / 2 * skew, (identity - rate / 2 * skew) @ rotation)


@dataclass(frozen=True)
class SpinQuant(Method):
    """Learns the rotation of the residual stream. Targets do not matter."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)
    refuses_experts: ClassVar[str] = "would read all experts of a block in each of its steps"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"rows"})

    bits: int = 4
    """Bits of a weight's code, as the rotation is fitted to."""
    symmetric: bool = True
    """Whether the weights' codes lie around 0."""
    input_bits: int = 4
    """Bits of an input's code."""
    input_symmetric: bool = False
    """Whether the inputs' codes lie around 0."""
    input_clip: float = 1.0
    """The range of a token's inputs is multiplied by this ratio."""
    steps: int = 200
    """Gradient steps, each on every linear that reads the stream of one block, in turn."""
    rate: float = 0.5
    """Length of a step on the manifold (norm of η·Y), falling linearly to 0."""

    def __post_init__(self) -> None:
        Grid(self.bits, None, self.symmetric)
        TokenGrid(self.input_bits, self.input_symmetric, self.input_clip)
        if self.steps < 0 or self.rate <= 0:
            raise UserError(f"expected steps of 0 or more and a positive rate, found {self.steps} and {self.rate}")

    def changes_residual_basis(self, roles: Sequence[str]) -> bool:
        return True

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        if survey.residual:
            raise UserError(
                "expected one step that changes the basis of the residual stream, found spinquant after another; leave "
                "one of the two out (quarot, larosa, permute_channels: residual: false)"
            )
        blocks = [index for index in range(survey.layers) if survey.readers(index)]
        if not blocks:
            raise UserError(
                "expected norms through which linears read the residual stream, found none; leave spinquant out"
            )
        generator = torch.Generator().manual_seed(survey.seed)
        size = survey.hidden
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        rotation = hadamard_transform(torch.diag(signs), hadamard_block(size))
        first = last = 0.0
        for step in range(self.steps):
            with torch.enable_grad():
                trial = rotation.clone().requires_grad_(True)
                loss = self._loss(survey, blocks[step % len(blocks)], trial.float())
                (gradient,) = torch.autograd.grad(loss, trial)
            if step < len(blocks):
                first += float(loss.detach()) / min(len(blocks), self.steps)
            if step >= self.steps - len(blocks):
                last += float(loss.detach()) / min(len(blocks), self.steps)
            rotation = cayley_step(rotation, gradient, self.rate * (1 - step / self.steps))
        survey.residual = (BlockMatrix(rotation.float()),)
        survey.notes.append(f"SpinQuant: mean output error of the stream's readers {first:.3g} → {last:.3g}")

    def _loss(self, survey: Survey, index: int, rotation: Tensor) -> Tensor:
        """Σ over the readers of ‖Q(x·R)·Q(W·R)ᵀ − x·Wᵀ‖²/‖x·Wᵀ‖², x with the norm's gain taken into W."""
        tensors = survey.block(index)
        total = torch.zeros(())
        grid = Grid(self.bits, None, self.symmetric)
        for group in survey.readers(index):
            scale = gain(tensors, group.norm)
            x = survey.rows(index, group.role) / torch.where(scale == 0, torch.ones_like(scale), scale)
            tokens = fake_tokens(x @ rotation, TokenGrid(self.input_bits, self.input_symmetric, self.input_clip))
            for name in group.names:
                weight = tensors[f"{name}.weight"] * scale
                rotated = weight @ rotation
                low, high = extremes(rotated, grid)
                rounded = fake_quantise(rotated, low, high, self.bits, self.symmetric)
                wanted = x @ weight.T
                total = total + (tokens @ rounded.T - wanted).square().sum() / wanted.square().sum()
        return total
