"""Functions of linears' inputs: what training puts between an activation and the linears that read it.

Hooks, not wrappers: parameters keep their names and identity, and whatever else a method does to the linear
(``effective``) goes on. Linears that read the output of one norm share one result, computed after that norm. Elsewhere
each linear has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tulle.errors import UserError
from tulle.models.description import describe

Rule = Callable[[Tensor], Tensor]
"""x ``[..., C_in]`` to what the linears read instead, of the same shape."""


def transform_inputs(model: nn.Module, rules: Mapping[str, Rule]) -> list[RemovableHandle]:
    """Applies ``rules[role]`` to the inputs of the role's linears, in every block of a transformers ``model``.

    Raises ``UserError`` for an architecture that is not known.
    """
    config: Any = model.config
    handles = []
    for layer in describe(config.to_dict()).layers:
        norms = {group.role: norm.name for group, norm in layer.own_norms()}
        for group in layer.groups:
            if group.role not in rules:
                continue
            if group.role in norms:
                norm = model.get_submodule(layer.prefix + norms[group.role])
                handles.append(norm.register_forward_hook(_after(rules[group.role])))
            else:
                for name in group.names:
                    handles.append(transform_input(model.get_submodule(layer.prefix + name), rules[group.role]))
    return handles


def mark_selected(model: nn.Module) -> None:
    """Notes that the model's inputs are selected: nothing that changes them may be added after that."""
    model.tulle_inputs_selected = True  # type: ignore[assignment]


def require_unselected(model: nn.Module, name: str) -> None:
    """Raises ``UserError`` if inputs are selected already, which method ``name`` is about to change."""
    if getattr(model, "tulle_inputs_selected", False):
        raise UserError(
            f"expected {name} before q_sparse, which selects among rounded inputs, found it after; swap them"
        )


def transform_input(linear: nn.Module, rule: Rule) -> RemovableHandle:
    """Applies a rule to the input of one linear."""
    return linear.register_forward_pre_hook(lambda module, arguments: (rule(arguments[0]), *arguments[1:]))


def _after(rule: Rule) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, arguments, output: rule(output)
