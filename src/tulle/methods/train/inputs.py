"""Functions in front of linears: what training puts between an input and the linears that read it.

Hooks, not wrappers: parameters keep their names and identity, and whatever else a method does to the linear
(``effective``) goes on. Linears that read the output of one norm share one result, made behind that norm; elsewhere
each linear has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tulle.errors import UserError
from tulle.models.anatomy import anatomy

Rule = Callable[[Tensor], Tensor]


def in_front(model: nn.Module, rules: Mapping[str, Rule]) -> list[RemovableHandle]:
    """Puts ``rules[role]`` in front of the role's linears, in every block of a transformers ``model``."""
    config: Any = model.config
    shape = anatomy(config.to_dict())
    handles = []
    for index in range(shape.layers):
        for row in shape.rows:
            if row.role not in rules:
                continue
            prefix = shape.block_prefix(index)
            if row.norm is not None:
                handles.append(model.get_submodule(prefix + row.norm).register_forward_hook(_after(rules[row.role])))
            else:
                for name in row.linears:
                    handles.append(in_front_of(model.get_submodule(prefix + name), rules[row.role]))
    return handles


def mark_selected(model: nn.Module) -> None:
    """Remembers that inputs have been selected: nothing that changes them may come after that."""
    model.tulle_inputs_selected = True  # type: ignore[assignment]


def require_unselected(model: nn.Module, name: str) -> None:
    """Raises ``UserError`` where inputs have been selected, which method ``name`` is about to change."""
    if getattr(model, "tulle_inputs_selected", False):
        raise UserError(
            f"expected {name} before q_sparse, which selects among rounded inputs, found it after; swap them"
        )


def in_front_of(linear: nn.Module, rule: Rule) -> RemovableHandle:
    """Puts a rule in front of one linear."""
    return linear.register_forward_pre_hook(lambda module, arguments: (rule(arguments[0]), *arguments[1:]))


def _after(rule: Rule) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, arguments, output: rule(output)
