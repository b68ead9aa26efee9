"""Block-level reconstruction: what a block's compressed linears still can change is trained against the dense block.

A layer-wise method makes each linear's output right on its own. Here all kept weights of a part of the block move
together, by AdamW on the mean squared error of the residual stream that leaves the part, relative to its size, on the
compressed model's inputs against the dense model's stream (BRECQ, Li et al. 2021, section 3, for rounding; for sparse
models e.g. Wang et al. 2024, "Reconstruct the Pruned Model without Any Retraining"):

- the part ``attention``: q, k, v, o against the stream after attention;
- then ``mlp``: gate, up, down against the stream after the block.

Masks do not move. In a quantised linear the codes do not move either; its steps are trained. Follows the step that
prunes; steps that quantise may follow, and are then fitted to what this one found.

Models with experts are refused: all experts of a block would have to be in memory at once. ``tulle recover`` takes
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.grid import storable_step
from tulle.errors import UserError
from tulle.methods.contract import CompressedBlock, LinearState, Method, Stage

PARTS = {"attention": ("qkv", "o"), "mlp": ("gate_up", "down")}


class Tuned(nn.Module):
    """A compressed linear whose kept weights, or steps, are trained."""

    def __init__(self, linear: LinearState, bias: Tensor | None):
        super().__init__()
        self.linear, self.bias = linear, bias
        self.mask = None if linear.mask is None else linear.mask.to(linear.weight.dtype)
        quantised = linear.quantised
        start = linear.weight if quantised is None else quantised.scale
        self.parameter = nn.Parameter(start.detach().clone())
        if quantised is not None:
            codes = quantised.codes.reshape(*quantised.scale.shape, -1).float()
            self.levels = codes - quantised.zero[..., None]

    def weight(self) -> Tensor:
        weight: Tensor = self.parameter
        if self.linear.quantised is not None:
            weight = (self.levels * self.parameter[..., None]).flatten(1)
        return weight if self.mask is None else weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self.bias)

    def keep(self) -> None:
        """Leaves what was found in the linear's state."""
        if self.linear.quantised is None:
            self.linear.weight = self.weight().detach()
        else:
            row_scale = self.linear.quantised.row_scale
            columns = None if row_scale is None else row_scale[:, None]
            grid = self.linear.quantised.grid
            self.linear.quantised.scale = storable_step(self.parameter.detach(), columns, grid)
            self.linear.weight = self.linear.quantised.dequantise(self.linear.mask)


@dataclass(frozen=True)
class Reconstruct(Method):
    """Trains kept weights (or steps) of a block's attention and MLP against the dense block."""

    stages: ClassVar[tuple[Stage, ...]] = ("refine",)
    refuses_experts: ClassVar[str] = "trains all linears of a feed-forward together"
    learns: ClassVar[bool] = True

    epochs: int = 10
    """Passes over the calibration batches, per part."""
    rate: float = 1e-2
    """Peak learning rate as a share of the parameters' root mean square per linear; falls along a cosine."""
    separate: bool = True
    """Attention first, then MLP; otherwise both at once, against the stream after the block."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.rate > 0:
            raise UserError(
                f"expected epochs of 1 or more and a rate above 0, found {self.epochs} and {self.rate}; try 10 and 1e-2"
            )

    def refine(self, block: CompressedBlock, roles: tuple[str, ...]) -> None:
        parts = PARTS if self.separate else {"block": tuple(r for part in PARTS.values() for r in part)}
        for name, members in parts.items():
            linears = [linear for role in members if role in block.groups for linear in block.groups[role].linears]
            if not linears:
                continue
            history = self._train(block, linears, 0 if name == "attention" else 1)
            block.notes.append(f"reconstruction, {name}: error {history[0]:.3g} → {min(history):.3g}")

    def _train(self, block: CompressedBlock, linears: Sequence[LinearState], stream: int) -> list[float]:
        """``stream``: 0 after attention, 1 after the block. Leaves the best state; returns the error of every epoch."""
        batches = list(block.batches())
        tuned = [Tuned(linear, block.modules[linear.name].bias) for linear in linears]
        parameters = [t.parameter for t in tuned]
        optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": self.rate * _size(t)} for p, t in zip(parameters, tuned, strict=True)],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        steps = self.epochs * len(batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(math.pi * s / steps))

        def lost(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, *wanted, valid = batch
            difference = (block.forward(x)[stream] - wanted[stream])[valid]
            return difference.square().sum(), wanted[stream][valid].square().sum()

        def error() -> float:
            with torch.no_grad():
                sums = torch.tensor([[float(part) for part in lost(batch)] for batch in batches]).double().sum(0)
            return float(sums[0] / sums[1].clamp(min=1e-30))

        with torch.enable_grad(), _in_place_of(block, tuned):
            history = [error()]
            best, kept = history[0], [p.detach().clone() for p in parameters]
            for _ in range(self.epochs):
                for batch in batches:
                    gap, size = lost(batch)
                    optimizer.zero_grad()
                    (gap / size).backward()
                    optimizer.step()
                    scheduler.step()
                history.append(error())
                if history[-1] < best:
                    best, kept = history[-1], [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for t, value in zip(tuned, kept, strict=True):
                t.parameter.copy_(value)
                t.keep()
                block.modules[t.linear.name].weight.copy_(t.linear.weight)
        return history


def _size(tuned: Tuned) -> float:
    """Root mean square of what is trained: kept weights or steps."""
    value = tuned.weight()[tuned.mask > 0] if tuned.mask is not None and tuned.linear.quantised is None else None
    value = tuned.parameter if value is None else value
    return float(value.detach().square().mean().sqrt()) if value.numel() else 0.0


@contextmanager
def _in_place_of(block: CompressedBlock, tuned: Sequence[Tuned]) -> Iterator[None]:
    """The modules of the linears compute with what is trained, for a while; their hooks stay."""
    originals = []
    try:
        for t in tuned:
            module = block.modules[t.linear.name]
            originals.append(module)
            module.forward = t.forward  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module in originals:
            del module.forward
