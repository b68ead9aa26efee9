"""Experts put back into the tensors of all experts that transformers reads of some families.

Tulle reads and packs every expert's linears by themselves (:mod:`tulle.models.stacked`). transformers merges them on
loading, but for these families, which never had them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tulle.export.folder import Entry
from tulle.models.description import Decoder, Mixture


@dataclass(frozen=True)
class Layout:
    """Names of the tensors of gate and up, and of down, ``[E, C_out, C_in]``; ``{}`` stands for the experts' list."""

    gate_up: str
    down: str
    by_turns: bool = False
    """Whether rows of gate and up come by turns, and not gate's first."""
    transposed: bool = False
    """Whether weights are ``[E, C_in, C_out]``."""


GRANITE = Layout("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
LAYOUTS: Mapping[str, Layout] = {
    "gpt_oss": Layout("{}.gate_up_proj", "{}.down_proj", by_turns=True, transposed=True),
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE,
}
"""By ``model_type``."""


def stacked(model: Decoder, entries: Sequence[Entry]) -> list[Entry]:
    """The same tensors, those of experts stacked where the family has them so. Memory: the experts of one layer."""
    layout = LAYOUTS.get(model.model_type)
    if layout is None:
        return list(entries)
    left = {entry.name: entry for entry in entries}
    for layer in model.layers:
        mixture = layer.feed_forward
        if not isinstance(mixture, Mixture):
            continue
        for number in range(2):
            groups = [expert.groups[number] for expert in layer.experts]
            name = (layout.down if number else layout.gate_up).format(mixture.expert.name)
            for what in ("weight", "bias") if groups[0].linears[0].bias else ("weight",):
                members = [[left.pop(f"{layer.prefix}{n}.{what}") for n in group.names] for group in groups]
                suffix = "_bias" if what == "bias" else ""
                entry = _entry(layout, f"{layer.prefix}{name}{suffix}", members, what == "weight")
                left[entry.name] = entry
    return list(left.values())


def _entry(layout: Layout, name: str, members: Sequence[Sequence[Entry]], weight: bool) -> Entry:
    """Of the entries of every expert's linears."""
    own = members[0]
    shape = (sum(entry.shape[0] for entry in own), *own[0].shape[1:])
    transposed = layout.transposed and weight
    dtype = max((entry.dtype for entries in members for entry in entries), key=lambda dtype: dtype.itemsize)
    make = partial(_stack, members, layout.by_turns, transposed, dtype)
    return Entry(name, dtype, (len(members), *(shape[::-1] if transposed else shape)), make)


def _stack(members: Sequence[Sequence[Entry]], by_turns: bool, transposed: bool, dtype: torch.dtype) -> Tensor:
    """``[E, …]``."""
    found = []
    for entries in members:
        tensors = [entry.make().to(dtype) for entry in entries]
        whole = torch.stack(tensors, 1).flatten(0, 1) if by_turns and len(tensors) > 1 else torch.cat(tensors)
        found.append(whole.T if transposed else whole)
    return torch.stack(found)
