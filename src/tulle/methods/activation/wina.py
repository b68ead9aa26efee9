"""WINA: inputs are weighted by the norms of their columns (Chen et al. 2025, "Weight Informed Neuron Activation").

Of the input x of W ``[C_out, C_in]`` the K largest |x_j|·‖W_:,j‖₂ of every token are kept (section 2.2): what a dropped
input takes from the output is x_j·W_:,j, and those scores are the lengths of that. Dropping the rest has the least
expected squared error where the columns of W are orthogonal.

Where we depart: linears that read one input (q, k, v; gate, up) share one mask, with the norms of their stacked
columns; the weights are not rotated to make their columns orthogonal (``larosa`` in front rotates for the inputs'
sake). The scores are those of the weights before they are pruned or quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.topk import UnitScore, check_share, top_k
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decision, Method, Stage


def column_scores(weights: Sequence[Tensor]) -> Tensor:
    """‖W_:,j‖₂ ``[C_in]`` of the weights ``[C_out, C_in]``, stacked."""
    return torch.stack([w.float().square().sum(0) for w in weights]).sum(0).sqrt()


@dataclass(frozen=True)
class WINA(Method):
    """Drops the inputs that contribute least, by magnitude times column norm."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    settles: ClassVar[frozenset[Decision]] = frozenset({"selection"})

    share: float = 0.5
    """Share of the inputs that are dropped, in every token."""
    block: int | None = None
    """Channels that compete with each other; None: all."""
    unit: int = 1
    """Consecutive channels that are kept or dropped together."""
    by: UnitScore = "norm"
    """What of a unit is compared: its largest magnitude (``max``) or its 2-norm (``norm``)."""
    rescale: bool = False
    """Gives a token its length back."""

    def __post_init__(self) -> None:
        check_share(self.share)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        try:
            top_k(self.share, shape[1], self.block, self.unit)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        for role in roles:
            linears = block.groups[role].linears
            score = column_scores([linear.folded() for linear in linears])
            allotted = linears[0].allotted_inputs
            share = self.share if allotted is None else allotted
            selection = top_k(share, len(score), self.block, self.unit, self.by, self.rescale, score)
            for linear in linears:
                linear.input_selection = selection
