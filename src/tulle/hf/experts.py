"""Experts as modules of their own, where transformers holds all of a layer in one parameter.

transformers' module for the experts of a layer takes hidden states ``[N, d]``, the chosen experts ``[N, k]`` and their
weights ``[N, k]``; :class:`Experts` stands in its place, with the linears of every expert below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tulle.errors import UserError
from tulle.format.spec import LinearSpec
from tulle.hf.packed_linear import PackedLinear
from tulle.models.decoder import ACTIVATIONS, gate_times_up
from tulle.models.description import GatedMLP, Layer, Mixture, PlainMLP, describe
from tulle.models.routing import Routes


class Experts(nn.Module):
    """The experts of a layer, each of which sees only the tokens that chose it."""

    def __init__(
        self,
        layer: Layer,
        expert: GatedMLP | PlainMLP,
        specs: Mapping[str, LinearSpec],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.expert = expert
        self._names: list[tuple[list[str], str]] = []
        for one in layer.experts:
            holder = nn.Module()
            for linear in one.linears():
                spec, last = specs.get(layer.prefix + linear.name), linear.name.rpartition(".")[2]
                if spec is None:
                    found: nn.Module = nn.Linear(
                        linear.shape[1], linear.shape[0], linear.bias, device=device, dtype=dtype
                    )
                else:
                    found = PackedLinear(spec, linear.bias, device=device, dtype=dtype)
                holder.add_module(last, found)
            self.add_module(str(one.index), holder)
            reads, writes = ([name.rpartition(".")[2] for name in group.names] for group in one.groups)
            self._names.append((reads, writes[0]))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ over a token's chosen experts of weight · output, ``[N, d]``."""
        total = torch.zeros_like(hidden_states)
        routes = Routes.of(top_k_index, top_k_weights)
        for index in routes.experts.unique().tolist():
            reads, down = self._names[index]
            holder = self.get_submodule(str(index))
            tokens, weights = routes.of_expert(index)
            x, activation = hidden_states[tokens], ACTIVATIONS[self.expert.activation]
            outputs = [holder.get_submodule(name)(x) for name in reads]
            if isinstance(self.expert, PlainMLP):
                inner = activation(outputs[0])
            else:
                inner = gate_times_up(self.expert, activation, *outputs)
            y = holder.get_submodule(down)(inner) * weights[:, None]
            total.index_add_(0, tokens, y.to(total.dtype))
        return total


def put_experts(model: PreTrainedModel, specs: Mapping[str, LinearSpec]) -> dict[str, PackedLinear]:
    """Puts :class:`Experts` in the place of transformers' modules; their packed linears by the names that they are
    stored under."""
    base: Any = getattr(model, model.base_model_prefix, model)
    places = {index: _place(block) for index, block in enumerate(getattr(base, "layers", []))}
    if not any(places.values()):
        return {}
    packed: dict[str, PackedLinear] = {}
    for layer in describe(model.config.to_dict()).layers:
        place = places[layer.index]
        if not isinstance(layer.feed_forward, Mixture):
            continue
        if place is None:
            raise UserError(
                f"expected one module of all experts in layer {layer.index} of {type(model).__name__}, found none; "
                "upgrade transformers to 5.23"
            )
        parent, child = place
        weight = getattr(parent, child).down_proj
        module = Experts(layer, layer.feed_forward.expert, specs, weight.device, weight.dtype)
        setattr(parent, child, module)
        for linear in (linear for expert in layer.experts for linear in expert.linears()):
            found = module.get_submodule(".".join(linear.name.split(".")[-2:]))
            if isinstance(found, PackedLinear):
                packed[layer.prefix + linear.name] = found
    return packed


def _place(block: nn.Module) -> tuple[nn.Module, str] | None:
    """Where a block has the module of all experts."""
    for parent in block.modules():
        for child, module in parent.named_children():
            if isinstance(getattr(module, "down_proj", None), nn.Parameter):
                return parent, child
    return None


def without_merges(conversions: list[Any]) -> list[Any]:
    """transformers' changes of names and tensors on loading, but those that put experts into one parameter."""
    return [found for found in conversions if not any("experts" in name for name in _targets(found))]


def _targets(conversion: Any) -> list[str]:
    found = getattr(conversion, "target_patterns", [])
    return [found] if isinstance(found, str) else list(found)
