"""Running a block of the plain decoder while somebody looks: inputs of its groups, and the stream between its parts."""

from __future__ import annotations

from torch import Tensor

from tulle.models.decoder import DecoderBlock, GroupInput, Heads, drive, run_group


def run_watched(block: DecoderBlock, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output ``[B, T, d]``, and the inputs ``[B, T, C_in]`` of its groups by role."""
    inputs: dict[str, Tensor] = {}

    def answer(given: GroupInput) -> tuple[Tensor, ...]:
        inputs[given.role] = given.x
        return run_group(block, given.group, given.x)

    return drive(block.steps(hidden), answer), inputs


def run_with_stream(block: DecoderBlock, hidden: Tensor, heads: Heads | None = None) -> tuple[Tensor, Tensor]:
    """The residual stream between mixer and feed-forward, and the block's output, ``[B, T, d]`` each, in the dtype of
    ``hidden``."""
    between: list[Tensor] = []

    def answer(given: GroupInput) -> tuple[Tensor, ...]:
        if given.role == "gate_up":
            between.append(given.residual.to(hidden.dtype))
        return run_group(block, given.group, given.x)

    out = drive(block.steps(hidden, heads), answer).to(hidden.dtype)
    return between[0], out
