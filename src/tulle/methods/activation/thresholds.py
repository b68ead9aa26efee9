"""TEAL: inputs below a calibrated magnitude are zero (Liu et al. 2024, "Training-Free Activation Sparsity in LLMs").

For the input x of a linear, s_t(x)_j = x_j if |x_j| > t, else 0 (equation 1), with t the p-quantile of |x| over
calibration tokens, so that a share p of the inputs is dropped on average; a token may keep more or fewer.

Where we depart: one threshold per group of linears that read one input, so that the input is selected once (the paper
lets q, k and v differ); thresholds are found on what the *compressed* model gives the block, the block itself being
dense; in the prefill all tokens are sparse (the paper leaves the first half of a prompt dense in its figures). Shares
that differ by block and role come from ``activation_budget`` in place of the paper's greedy search.

With ``kind: top_k`` the largest |x_j| of every token are kept instead, in exact number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tulle.core.topk import Selection, UnitScore, check_share, top_k
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, Method, Stage, Statistic


def threshold_for(x: Tensor, share: float) -> float:
    """t such that |x| <= t for a ``share`` of the numbers of X ``[T, C]``: the round(share·T·C)-th smallest |x|.

    0 for a share so small that it rounds to none, where exact zeros alone are dropped.
    """
    size = x.abs().flatten()
    rank = round(share * len(size))
    return 0.0 if rank < 1 else float(size.kthvalue(rank).values)


@dataclass(frozen=True)
class TEAL(Method):
    """Drops inputs of small magnitude."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    needs: ClassVar[frozenset[Statistic]] = frozenset({"sample"})
    settles: ClassVar[frozenset[Decision]] = frozenset({"selection"})

    share: float = 0.5
    """Share of the inputs that are dropped."""
    kind: Literal["threshold", "top_k"] = "threshold"
    """Inputs above a calibrated magnitude are kept, or the largest of every token in exact number."""
    block: int | None = None
    """Of top_k: channels that compete with each other; None: all."""
    unit: int = 1
    """Of top_k: consecutive channels that are kept or dropped together."""
    by: UnitScore = "max"
    """What of a unit is compared: its largest magnitude (``max``) or its 2-norm (``norm``)."""
    rescale: bool = False
    """Gives a token its length back."""

    def __post_init__(self) -> None:
        check_share(self.share)
        if self.kind == "threshold" and (self.block is not None or self.unit != 1):
            raise UserError("expected block and unit only with kind: top_k, found them with threshold; leave them out")

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        if self.kind == "top_k":
            try:
                top_k(self.share, shape[1], self.block, self.unit)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None

    def selection(self, share: float, x: Tensor) -> Selection:
        """The selection that drops a ``share`` of X ``[T, C]``, as the weights read it."""
        if self.kind == "top_k":
            return top_k(share, x.shape[1], self.block, self.unit, self.by, self.rescale)
        # As the file holds it.
        threshold = float(torch.tensor(threshold_for(x, share)))
        return Selection("threshold", threshold=threshold, rescale=self.rescale)

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for role in roles:
            group = block.groups[role]
            x = group.statistics.sample
            assert x is not None
            grid, allotted = group.linears[0].input_grid, group.linears[0].allotted_inputs
            share = self.share if allotted is None else allotted
            selection = self.selection(share, x if grid is None else grid.fake(x))
            for linear in group.linears:
                linear.input_selection = selection
