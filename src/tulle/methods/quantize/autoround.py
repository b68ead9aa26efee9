"""AutoRound: Cheng, Zhang, Shen, Cai, He, Lv, Liu 2023, "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs".

A layer-wise method rounds every linear for itself. Here all codes of a block move together: with u the codes, z the
zero points and s the steps of a group,

    Ŵ = s·a·(clip(round(u + V), 0, 2^b − 1) − z),   |V| ≤ 1/2,   a > 0,

V (a number per weight, eq. 3) and a (one per step; the paper has one for each end of the range) are trained on the mean
squared error of the block's output on the compressed model's inputs, against the dense model's. Rounding is passed
straight through. The update is the gradient's sign times a rate that falls linearly to 0 (eqs 5-6): a weight whose
gradient keeps one sign crosses at most one boundary.

Departures:
- u are the codes that the step in front found (GPTQ with descent), not those of rounding to nearest, and V starts where
  the weight that was rounded lies, within ±1/2: what lay near a boundary crosses it first.
- Whether the result is better is measured on all calibration tokens; what is not is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.grid import grouped, nearest_step, to_bfloat16
from tulle.errors import UserError
from tulle.methods.contract import CompressedBlock, LinearState, Method, Stage

INSIDE = 0.499
"""Largest |V| at the start: codes are then those that were found."""


class Rounding:
    """A quantised linear whose rounding and steps are trained.

    The gradient g of Ŵ is all that autograd is asked for. What follows from it is written out: ∂/∂V = g·s·a where the
    code is not clipped, whose sign is g's; ∂/∂a = Σ g·s·(u − z) over the group.
    """

    def __init__(self, linear: LinearState, dtype: torch.dtype):
        assert linear.quantised is not None
        q = self.quantised = linear.quantised
        self.linear = linear
        self.mask = None if linear.mask is None else grouped(linear.mask.to(torch.float32), q.grid.group_size)
        self.codes = grouped(q.codes.float(), q.grid.group_size)
        self.scale, self.zero = q.scale[..., None], q.zero[..., None]
        place = grouped(linear.wanted(), q.grid.group_size) / self.scale + self.zero - self.codes
        self.shift = place.clamp_(-INSIDE, INSIDE)
        self.gain = torch.ones_like(self.scale)
        self.levels = torch.empty_like(self.codes)
        self.weight = nn.Parameter(linear.weight.to(dtype))
        self.round()

    def round(self) -> None:
        """Makes u − z and Ŵ of V and a as they are."""
        torch.add(self.codes, self.shift, out=self.levels)
        self.levels.round_().clamp_(self.quantised.grid.low, self.quantised.grid.high).sub_(self.zero)
        if self.mask is not None:
            self.levels.mul_(self.mask)
        self.weight.data.copy_((self.levels * (self.scale * self.gain)).flatten(1))

    def step(self, rate: float, step_rate: float) -> None:
        """Signed gradient descent."""
        assert self.weight.grad is not None
        g = grouped(self.weight.grad.float(), self.quantised.grid.group_size)
        self.weight.grad = None
        slope = (g * self.levels).sum(-1, keepdim=True)
        self.gain.sub_(slope.sign_(), alpha=step_rate).clamp_(0.5, 1.5)
        # At the ends V stays within ±1/2 of the clipped code, so that it finds back.
        self.shift.sub_(g.sign_(), alpha=rate).clamp_(-0.5, 0.5)
        self.round()

    def keep(self) -> None:
        """Leaves codes and steps, as they are stored, in the linear's state."""
        q = self.quantised
        codes = (self.codes + self.shift).round_().clamp_(q.grid.low, q.grid.high)
        q.codes = codes.flatten(1).to(torch.int16)
        step = q.scale * self.gain[..., 0]
        q.scale = to_bfloat16(step) if q.row_scale is None else nearest_step(step, q.row_scale[:, None])
        self.linear.weight = q.dequantise(self.linear.mask)


@dataclass(frozen=True)
class AutoRound(Method):
    """Trains the rounding and the steps of a block's quantised linears against the dense block."""

    stages: ClassVar[tuple[Stage, ...]] = ("refine",)
    learns: ClassVar[bool] = True

    steps: int = 100
    """Updates per block."""
    tokens: int = 2048
    """Calibration tokens per update."""
    rate: float = 1.0
    """Sum of all rates times 2: how far a V can go, in codes."""
    step_rate: float = 0.1
    """The same of the steps, as a share of themselves."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens < 1 or not self.rate > 0 or not self.step_rate >= 0:
            raise UserError(
                f"expected steps and tokens of 1 or more and positive rates, found {self.steps}, {self.tokens}, "
                f"{self.rate} and {self.step_rate}; the defaults are 100, 2048, 1 and 0.1"
            )

    def refine(self, block: CompressedBlock, roles: tuple[str, ...]) -> None:
        linears = [linear for role in roles if role in block.groups for linear in block.groups[role].linears]
        linears = [linear for linear in linears if linear.quantised is not None]
        if not linears:
            return
        batches = list(block.batches())
        before = self._error(block, batches)
        fast = torch.bfloat16 if _is_fast(linears[0].weight.device) else torch.float32
        roundings = [Rounding(linear, fast) for linear in linears]
        old = [(r.quantised.codes, r.quantised.scale, r.linear.weight) for r in roundings]
        with torch.enable_grad(), _in_place_of(block, roundings):
            self._train(block, batches, roundings)
        with torch.no_grad():
            for r in roundings:
                r.keep()
                block.modules[r.linear.name].weight.copy_(r.linear.weight)
            after = self._error(block, batches)
            if not after < before:
                for r, (codes, scale, weight) in zip(roundings, old, strict=True):
                    r.quantised.codes, r.quantised.scale, r.linear.weight = codes, scale, weight
                    block.modules[r.linear.name].weight.copy_(weight)
        block.notes.append(f"AutoRound: error {before:.3g} → {after:.3g}{'' if after < before else ', put back'}")

    def _train(
        self,
        block: CompressedBlock,
        batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
        roundings: Sequence[Rounding],
    ) -> None:
        generator = torch.Generator().manual_seed(block.index)
        rows = [(i, row) for i, batch in enumerate(batches) for row in range(len(batch[0]))]
        count = max(1, round(self.tokens * len(rows) / sum(int(batch[3].sum()) for batch in batches)))
        order: list[int] = []
        for number in range(self.steps):
            left = 1 - number / self.steps
            taken: dict[int, list[int]] = {}
            for _ in range(min(count, len(rows))):
                order = order or torch.randperm(len(rows), generator=generator).tolist()
                i, row = rows[order.pop()]
                taken.setdefault(i, []).append(row)
            size = sum(float(batches[i][2][at][batches[i][3][at]].float().square().sum()) for i, at in taken.items())
            for i, at in taken.items():
                x, _, wanted, valid = (part[at] for part in batches[i])
                with _fast(x.device):
                    difference = (block.forward(x.float())[1].float() - wanted.float())[valid]
                (difference.square().sum() / size).backward()
            with torch.no_grad():
                for r in roundings:
                    r.step(left * self.rate / self.steps, left * self.step_rate / self.steps)

    def _error(self, block: CompressedBlock, batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> float:
        """Σ|ŷ − y|²/Σ|y|² of the block's output."""
        lost = total = 0.0
        with torch.no_grad():
            for x, _, wanted, valid in batches:
                with _fast(x.device):
                    found = block.forward(x.float())[1].float()
                lost += float((found - wanted.float())[valid].square().sum())
                total += float(wanted[valid].float().square().sum())
        return lost / max(total, 1e-30)


def _is_fast(device: torch.device) -> bool:
    """Whether the machine has instructions for products in bfloat16."""
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cpu" or cpu


def _fast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_is_fast(device))


@contextmanager
def _in_place_of(block: CompressedBlock, roundings: Sequence[Rounding]) -> Iterator[None]:
    """The modules of the linears compute with what is trained, for a while; their hooks stay."""
    originals = []
    try:
        for r in roundings:
            module = block.modules[r.linear.name]
            bias = module.bias

            def forward(x: Tensor, r: Rounding = r, bias: Tensor | None = bias) -> Tensor:
                return nn.functional.linear(x, r.weight, bias)

            originals.append(module)
            module.forward = forward  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module in originals:
            del module.forward
