"""Which inputs of a linear a token keeps: Top-K of whole tokens, of blocks and of aligned units, thresholds, ReLU.

For x ``[..., C]`` a *selection* gives a mask M, and the linear sees x⊙M:

- ``top_k``: of every ``block`` consecutive channels (None: of all C) the ``keep`` with the largest scores |x_j|, or
  |x_j|·c_j with ``score`` c (WINA). With ``unit`` u > 1, channels are kept or dropped u at a time, aligned, a unit's
  score being the largest of its channels' (``by: max``) or their 2-norm (``norm``). Counts are exact and ties go to the
  lower index.
- ``threshold``: |x_j| > t (TEAL).
- ``relu``: x_j > 0 (ReLUfication).

With ``rescale`` the token gets its length back: x⊙M·‖x‖₂/‖x⊙M‖₂. Q-Sparse (Wang et al. 2024, section 2.1) says it
"re-scales the tensor by its L2 norm"; dividing by ‖x⊙M‖₂ alone would not be the identity where everything is kept.

What stands in front (transforms, a grid) comes first: a selection acts on the numbers that the weights would read, as
float32. On a symmetric grid Top-K therefore compares whole numbers, and the lower index wins among equal codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tulle import native
from tulle.core.masks import largest
from tulle.errors import UserError

Kind = Literal["top_k", "threshold", "relu"]
UnitScore = Literal["max", "norm"]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Settings of a selection (see the module's docstring). Raises ``UserError`` where they contradict each other."""

    kind: Kind = "top_k"
    keep: int | None = None
    """Channels kept of every block, a multiple of ``unit``."""
    block: int | None = None
    """Channels that compete with each other; None: all of the token."""
    unit: int = 1
    by: UnitScore = "max"
    threshold: float | None = None
    rescale: bool = False
    score: Tensor | None = None
    """c, float32 ``[C]``."""

    def __post_init__(self) -> None:
        problem = self.problem()
        if problem:
            raise UserError(problem)

    def problem(self) -> str | None:
        if self.kind != "top_k":
            if self.keep is not None or self.block is not None or self.unit != 1 or self.score is not None:
                return f"expected keep, block, unit and score only with top_k, found them with {self.kind}"
            if (self.threshold is not None) != (self.kind == "threshold"):
                return f"expected a threshold with kind threshold and no other, found {self.threshold} in {self.kind}"
            if self.threshold is not None and not self.threshold >= 0:
                return f"expected a threshold of 0 or more, found {self.threshold}"
            return None
        if self.threshold is not None:
            return f"expected no threshold with top_k, found {self.threshold}"
        if self.keep is None or self.unit < 1 or self.keep < 1 or self.keep % self.unit:
            return f"expected keep as a positive multiple of unit {self.unit}, found {self.keep}"
        if self.block is not None and (self.block % self.unit or self.block < self.keep):
            return (
                f"expected a block of at least keep {self.keep} channels and a multiple of unit {self.unit}, "
                f"found {self.block}"
            )
        return None

    def fits(self, channels: int) -> str | None:
        """Why this cannot stand in front of a linear of ``channels`` inputs, or None."""
        if self.kind != "top_k":
            return None
        if channels % (self.block or self.unit):
            what = f"block of {self.block}" if self.block else f"unit of {self.unit}"
            return f"expected {channels} input channels to be divisible by the selection's {what}"
        if self.keep is not None and self.keep > (self.block or channels):
            return f"expected keep of at most {channels} input channels, found {self.keep}"
        if self.score is not None and self.score.shape != (channels,):
            return f"expected one score for each of {channels} input channels, found {list(self.score.shape)}"
        return None

    def mask(self, x: Tensor) -> Tensor:
        """M, bool ``[..., C]``, of x ``[..., C]``; no gradient."""
        x = x.detach()
        if self.kind == "relu":
            return x > 0
        size = x.float().abs()
        if self.kind == "threshold":
            assert self.threshold is not None
            return size > self.threshold
        assert self.keep is not None
        if self.score is not None:
            size = size * self.score.to(size.device)
        shape = size.shape
        if self.block is not None and self.block != shape[-1]:
            size = size.unflatten(-1, (-1, self.block))
        if self.unit == 1:
            return keep_largest(size, self.keep).reshape(shape)
        units = size.unflatten(-1, (-1, self.unit))
        units = units.amax(-1) if self.by == "max" else units.square().sum(-1)
        return keep_largest(units, self.keep // self.unit).repeat_interleave(self.unit, -1).reshape(shape)

    def ratio(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """‖x‖₂/‖x⊙M‖₂, float32 ``[..., 1]`` without gradient, 1 for a token of zeros; None without ``rescale``."""
        if not self.rescale:
            return None
        x = x.detach().float()
        kept = (x * mask).norm(dim=-1, keepdim=True)
        return torch.where(kept > 0, x.norm(dim=-1, keepdim=True) / kept, 1.0)

    def apply(self, x: Tensor, straight_through: bool = True) -> Tensor:
        """x⊙M (times the ratio) in the dtype of x.

        The gradient passes the mask as if it were not there (Q-Sparse, equation 8), or only where M is 1. The ratio is
        a constant to it.
        """
        mask = self.mask(x)
        ratio = self.ratio(x, mask)
        y: Tensor = _Masked.apply(x, mask, straight_through)  # type: ignore[no-untyped-call]
        return y if ratio is None else y * ratio.to(x.dtype)


def top_k(
    share: float,
    channels: int,
    block: int | None = None,
    unit: int = 1,
    by: UnitScore = "max",
    rescale: bool = False,
    score: Tensor | None = None,
) -> Selection:
    """The Top-K that zeroes a ``share`` of ``channels`` inputs: of every block of n/u units, round(share·n/u) go, and
    at least one stays. Raises ``UserError`` where block or unit do not divide the channels."""
    check_share(share)
    width = channels if block is None else block
    units = width // unit if unit >= 1 else 0
    if units < 1 or width % unit or channels % width:
        raise UserError(
            f"expected a block that divides {channels} input channels and a unit that divides the block, found block "
            f"{block} and unit {unit}; choose others or leave this role out"
        )
    keep = unit * max(1, units - round(share * units))
    return Selection(keep=keep, block=block, unit=unit, by=by, rescale=rescale, score=score)


def check_share(share: float) -> None:
    """Raises ``UserError`` unless a share of zeroed inputs lies in [0, 1)."""
    if not 0 <= share < 1:
        raise UserError(f"expected a share of zeroed inputs in [0, 1), found {share}; 0.5 drops half of them")


@torch.library.custom_op("tulle::keep_largest", mutates_args=())
def keep_largest(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores >= 0 along the last axis; ties go to the lower index.

    As :func:`tulle.core.masks.largest`, many times faster on a CPU. One opaque operator, so that a compiled model
    keeps it whole.
    """
    n = scores.shape[-1]
    if keep >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        flat = scores.detach().reshape(-1, n).numpy()
        return torch.from_numpy(native.keep_largest(flat, keep, torch.get_num_threads())).reshape(scores.shape)
    mask = scores >= scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    # Never fewer than keep, so that an exact total means an exact count in every row.
    if int(mask.sum()) == keep * (mask.numel() // n):
        return mask
    return largest(scores, keep)


@keep_largest.register_fake
def _(scores: Tensor, keep: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


class _Masked(torch.autograd.Function):
    """x⊙M with ∂L/∂x := ∂L/∂(x⊙M), or that ⊙M."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, straight_through: bool) -> Tensor:
        ctx.straight_through = straight_through
        if not straight_through:
            ctx.save_for_backward(mask)
        # The same as torch.where with zeros, several times as fast.
        bits = INTEGERS[x.element_size()]
        return (x.view(bits) & -mask.view(torch.int8).to(bits)).view(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if ctx.straight_through:
            return gradient, None, None
        (mask,) = ctx.saved_tensors
        return gradient * mask, None, None
