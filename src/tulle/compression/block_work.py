"""A block while it is compressed: the dense and the compressed form side by side, and the state of every linear."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.activity import Counter, columns_of
from tulle.core.grid import all_finite
from tulle.core.head_grids import HeadGrids
from tulle.core.masks import PATTERNS, Pattern, follows, zero_share
from tulle.core.quantised_input import QuantisedInput
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.errors import UserError
from tulle.methods.contract import BlockState, Decisions, GroupState, LinearState, Statistics
from tulle.models.decoder import DecoderBlock
from tulle.models.description import Layer, LinearGroup, target_of

SPARSE_FROM = 0.01
"""Share of exact zeros from which on a linear of a checkpoint counts as pruned."""
DENSIFIED = "a rotation or another map of its inputs densified the checkpoint's zeros; leave it out to keep them"


@dataclass
class Part:
    """What block steps see at a time: a layer without its experts, or one expert."""

    groups: dict[str, GroupState]
    """By role, in the order in which they run; those that the recipe has anything to do with."""
    roles: tuple[str, ...]
    """Roles that linear steps target."""
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by relative name that block steps changed."""
    attention: HeadGrids | None = None
    notes: list[str] = field(default_factory=list)
    permutations: list[dict[str, Any]] = field(default_factory=list)

    def linears(self) -> list[LinearState]:
        return [linear for group in self.groups.values() for linear in group.linears]


@dataclass
class BlockWork:
    """The block; ``dense`` and ``compressed`` share every tensor but those of linears that were compressed."""

    layer: Layer
    dtypes: Mapping[str, torch.dtype]
    """What tensors (relative names) are stored as if nothing quantises them."""
    dense: DecoderBlock
    compressed: DecoderBlock
    part: Part
    """The layer without its experts."""
    inputs: dict[str, QuantisedInput] = field(default_factory=dict)
    """In front of the compressed block's linears, by relative name."""
    hooks: dict[str, Any] = field(default_factory=dict)
    linear_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def relative(self, linear: LinearState) -> str:
        return linear.name.removeprefix(self.layer.prefix)

    def input_of(self, group: LinearGroup, x: Tensor) -> Tensor:
        """What the group's first linear multiplies with its weights in the compressed block."""
        quantised = self.inputs.get(group.names[0])
        return x if quantised is None else quantised(x)

    def begin(self, part: Part, decisions: Decisions) -> None:
        """Every linear's state at the start of the linear steps, and what runs on its inputs."""
        for group in part.groups.values():
            group.statistics = Statistics()
            for linear in group.linears:
                linear.kept_bits = decisions.kept.get(linear.name)
                linear.allotted_grid = decisions.grids.get(linear.name)
                linear.allotted = decisions.sparsity.get(linear.name)
                linear.weight = linear.folded() if linear.transform else linear.dense
                hold_zeros(linear)
                self._install(linear)
            self._put_inputs_in_front(group)
            if group.role not in part.roles:
                self.finish(group)

    def finish(self, group: GroupState) -> None:
        """Puts the effective weights, as they will be stored, into the compressed block."""
        for linear in group.linears:
            if linear.quantised is None:
                if linear.mask is not None:  # the fit to the dense model has moved zeros, and no step has put them back
                    linear.weight = linear.weight * linear.mask
                linear.weight = linear.weight.to(self.dtypes[f"{self.relative(linear)}.weight"]).float()
            if not all_finite(linear.weight):
                raise UserError(
                    f"expected finite weights after the recipe's steps, found NaN or Inf in {linear.name}; raise the "
                    "damping"
                )
            self._install(linear)
        self._put_inputs_in_front(group)

    def drop(self, part: Part) -> None:
        """Forgets what stands in front of a part's linears."""
        for linear in part.linears():
            self._remove_input(self.relative(linear))

    def counter(self, group: LinearGroup) -> Counter:
        """To count what the tokens read of a group's weights as they are in the compressed block now."""
        weights = [self.compressed.get_submodule(name).weight for name in group.names]
        return Counter(columns_of(weights))  # type: ignore[arg-type]

    def _install(self, linear: LinearState) -> None:
        module = self.compressed.get_submodule(self.relative(linear))
        module.weight = nn.Parameter(linear.weight.to(self.compressed.dtype), requires_grad=False)

    def _put_inputs_in_front(self, group: GroupState) -> None:
        """Transforms, quantisers and selections in front of a group's linears; siblings see one result."""
        shared: dict[tuple[TokenGrid | None, Selection | None], QuantisedInput] = {}
        for linear in group.linears:
            name, found = self.relative(linear), (linear.input_grid, linear.input_selection)
            self._remove_input(name)
            if linear.transform or any(part is not None for part in found):
                quantised = shared.setdefault(found, QuantisedInput(linear.transform, *found))
                module = self.compressed.get_submodule(name)
                self.inputs[name], self.hooks[name] = quantised, module.register_forward_pre_hook(quantised.pre_hook)

    def _remove_input(self, name: str) -> None:
        if hook := self.hooks.pop(name, None):
            hook.remove()
            del self.inputs[name]


def group_state(layer: Layer, group: LinearGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> GroupState:
    """A group's linears before any step."""
    linears = []
    for name in group.names:
        weight = weights[f"{name}.weight"]
        linears.append(LinearState(name=layer.prefix + name, weight=weight, dense=weight, role=target_of(group.role)))
    return GroupState(group.role, linears, statistics)


def rewritten(
    layer: Layer, groups: Sequence[LinearGroup], state: BlockState, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a block's ``groups`` that block steps changed, by relative name."""
    tensors = {f"{name.removeprefix(layer.prefix)}.bias": bias for name, bias in state.biases.items()}
    for group, norm in layer.own_norms():
        if group not in groups:
            continue
        stored, gain = weights[f"{norm.name}.weight"], state.gains[group.role] - norm.offset
        # As it was, to the bit, where no step has changed it.
        tensors[f"{norm.name}.weight"] = stored if torch.equal(state.gains[group.role], stored + norm.offset) else gain
        if norm.bias:
            tensors[f"{norm.name}.bias"] = state.norm_biases[group.role]
    for group in groups:
        for linear in state.groups[group.role].linears:
            tensors[f"{linear.name.removeprefix(layer.prefix)}.weight"] = linear.dense
    return {name: tensor for name, tensor in tensors.items() if tensor is not weights[name]}


def hold_zeros(linear: LinearState) -> None:
    """Takes the zeros of a checkpoint that was pruned before for the linear's mask, which every method keeps.

    A transform that mixes channels has densified them by now; the report says so.
    """
    if linear.mask is not None or zero_share(linear.dense) < SPARSE_FROM:
        return
    if zero_share(linear.weight) < SPARSE_FROM:
        linear.notes.append(DENSIFIED)
        return
    linear.mask = linear.weight != 0
    linear.pattern = next((text for text in PATTERNS if follows(linear.mask, Pattern.parse(text))), None)
