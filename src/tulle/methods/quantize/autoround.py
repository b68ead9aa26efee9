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


class _RoundThrough(torch.autograd.Function):
    """round(x) with the gradient of x."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Rounding(nn.Module):
    """A quantised linear whose rounding and steps are trained."""

    def __init__(self, linear: LinearState, wanted: Tensor):
        """``wanted`` ``[C_out, C_in]``: the weight that was rounded."""
        super().__init__()
        assert linear.quantised is not None
        q = self.quantised = linear.quantised
        self.linear = linear
        self.mask = None if linear.mask is None else linear.mask.to(torch.float32)
        self.codes = grouped(q.codes.float(), q.grid.group_size)
        self.scale, self.zero = q.scale[..., None], q.zero[..., None]
        place = grouped(wanted, q.grid.group_size) / self.scale + self.zero - self.codes
        self.shift = nn.Parameter(place.clamp(-INSIDE, INSIDE))
        self.gain = nn.Parameter(torch.ones_like(self.scale))

    def rounded(self) -> Tensor:
        """Codes ``[C_out, G, C_in/G]``."""
        whole: Tensor = _RoundThrough.apply(self.codes + self.shift)
        return whole.clamp(self.quantised.grid.low, self.quantised.grid.high)

    def weight(self) -> Tensor:
        weight = ((self.rounded() - self.zero) * (self.scale * self.gain)).flatten(1)
        return weight if self.mask is None else weight * self.mask

    def step(self, rate: float, step_rate: float) -> None:
        """Signed gradient descent."""
        for parameter, size in ((self.shift, rate), (self.gain, step_rate)):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign_(), alpha=size)
                parameter.grad = None
        self.shift.clamp_(-0.5, 0.5)
        self.gain.clamp_(0.5, 1.5)

    def keep(self) -> None:
        """Leaves codes and steps, as they are stored, in the linear's state."""
        q = self.quantised
        q.codes = self.rounded().flatten(1).to(torch.int16)
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
        roundings = [Rounding(linear, linear.wanted()) for linear in linears]
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


def _fast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the machine has instructions for it."""
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu)


@contextmanager
def _in_place_of(block: CompressedBlock, roundings: Sequence[Rounding]) -> Iterator[None]:
    """The modules of the linears compute with what is trained, for a while; their hooks stay.

    A weight is made once for all batches of an update.
    """
    originals = []
    try:
        for r in roundings:
            module = block.modules[r.linear.name]
            bias = module.bias

            def forward(x: Tensor, r: Rounding = r, bias: Tensor | None = bias) -> Tensor:
                return nn.functional.linear(x, r.weight(), bias)

            originals.append(module)
            module.forward = forward  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module in originals:
            del module.forward
