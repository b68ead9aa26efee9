"""Q-Sparse: every linear sees only the K largest inputs of a token, in training as later (Wang et al. 2024, "Q-Sparse:
All Large Language Models can be Fully Sparsely-Activated", section 2).

    Y = (X ⊙ M)·Wᵀ,   M = Top_K(|X|),   ∂L/∂X := ∂L/∂(X ⊙ M)          (equations 1, 2 and 8)

on the inputs of q/k/v (one mask), o, gate/up (one mask) and down. Quantised: X is rounded to ``input_bits`` first
(equation 5), and Top-K is of the rounded numbers. **Block Q-Sparse** keeps ``block``·(1 − share) of every ``block``
inputs (16 of 32 in the paper). ``activation: relu2`` makes the feed-forward ReLU²GLU(X) = XW_up ⊙ ReLU²(XW_gate)
(equation 4), whose own zeros come on top: with ``share: 0.3``, the paper's "Top-K 70 %" from scratch, about 40 % of all
weights are not read.

``rescale`` gives a token its length back after the selection (see ``core.topk``); the authors' released code has none.
``straight_through: false`` is their ablation: the gradient then stops where M is 0. ``begin`` and ``end`` are not the
paper's, which drops as much from the first step on: between these shares of the training the number of dropped inputs
grows from none.

**ReLUfication** (Mirzadeh et al. 2024, "ReLU Strikes Back"): ``activation: relu`` with ``kind: none``, that is ReLU in
place of SiLU and no Top-K (stage 1); ``kind: relu`` puts ReLU after the norms as well (stage 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection, UnitScore, check_share, top_k
from tulle.errors import UserError
from tulle.methods.contract import LinearState
from tulle.methods.train.effective import StraightThrough
from tulle.methods.train.inputs import Rule, mark_selected, transform_input, transform_inputs
from tulle.methods.train.method import TrainingMethod
from tulle.models.description import ROLES, describe

AFTER_NORMS = ("qkv", "gate_up")
"""Roles that read a norm's output, where stage 2 of ReLUfication acts."""
COUNT_EVERY = 5
"""Zeros are counted in one of so many calls of a block."""
RAMP_STEPS = 32
"""The number of dropped inputs grows in so many steps: a compiled model is compiled anew at each."""


@dataclass(eq=False)
class QSparse(TrainingMethod):
    """Trains with sparse inputs.

    Raises ``UserError`` for fractions outside their range, roles that do not exist, and ``end`` without Top-K.
    """

    settles: ClassVar[frozenset[str]] = frozenset({"selection"})

    share: float = 0.3
    """Fraction of the inputs that is dropped, in every token."""
    shares: dict[str, float] = field(default_factory=dict)
    """Role → its own fraction."""
    kind: Literal["top_k", "relu", "none"] = "top_k"
    """``top_k`` keeps the largest inputs of a token; ``relu`` puts ReLU behind the norms; ``none`` drops nothing."""
    block: int | None = None
    """Channels that compete with each other; None: all of the token."""
    unit: int = 1
    """Consecutive channels that are kept or dropped together."""
    by: UnitScore = "max"
    """What of a unit is compared: its largest magnitude or its 2-norm."""
    straight_through: bool = True
    """The gradient reaches dropped inputs too (equation 8)."""
    rescale: bool = False
    """Scales what is kept to the length that the token had."""
    begin: float = 0.0
    """Fraction of the training up to which nothing is dropped."""
    end: float = 0.0
    """Fraction of the training from which on ``share`` is dropped; 0: always."""
    input_bits: int | None = None
    """Rounds inputs per token first; null: as they are (with bitnet before it in the list, they are rounded there)."""
    activation: Literal["relu", "relu2"] | None = None
    """Takes the place of the feed-forward's SiLU; null: it stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in (self.share, *self.shares.values()):
            check_share(share)
        unknown = [role for role in self.shares if role not in ROLES]
        if unknown:
            raise UserError(f"expected shares of {', '.join(ROLES)}, found {unknown[0]!r}; correct the recipe")
        if not (0 <= self.begin < self.end <= 1 or self.begin == self.end == 0):
            raise UserError(
                f"expected 0 <= begin < end <= 1, found {self.begin} and {self.end}; both are shares of the training, "
                "and without them as many inputs are dropped from its first step on"
            )
        if self.end and self.kind != "top_k":
            raise UserError(f"expected end only with kind top_k, found {self.end} with {self.kind}; leave it out")
        self.grid = None if self.input_bits is None else TokenGrid(self.input_bits)
        self.selections: dict[str, Selection] = {}
        """By linear."""
        self._zeros: dict[str, list[Tensor]] = {}
        self._ramp = 0 if self.end else RAMP_STEPS

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        super().prepare(model, steps, linears)
        if self.end and steps < 1:
            raise UserError("expected the number of steps for begin and end, found none; call prepare(model, steps)")
        if self.activation is not None:
            set_activation(model, self.activation)
        mark_selected(model)
        if linears is not None:
            for name, linear in linears.items():
                self._choose(name, self.selection("", linear.in_features))
                transform_input(linear, self._rule("", self.selections.get(name)))
            return
        config: Any = model.config
        shape = describe(config.to_dict())
        rules: dict[str, Rule] = {}
        for role in self.targets:
            selection = self.selection(role, shape.layers[0].group(role).inputs)
            rules[role] = self._rule(role, selection)
            for name in self.linears:
                if shape.role_of(name) == role:
                    self._choose(name, selection)
        transform_inputs(model, rules)

    def _choose(self, name: str, selection: Selection | None) -> None:
        if selection is not None:
            self.selections[name] = selection

    def selection(self, role: str, channels: int) -> Selection | None:
        """What a role's linears of ``channels`` inputs see; None: everything."""
        if self.kind == "none" or (self.kind == "relu" and role not in AFTER_NORMS):
            return None
        if self.kind == "relu":
            return Selection("relu")
        share = self.shares.get(role, self.share)
        return top_k(share, channels, self.block, self.unit, self.by, self.rescale)

    def _rule(self, role: str, selection: Selection | None) -> Rule:
        calls = 0

        def rule(x: Tensor) -> Tensor:
            if self.grid is not None:
                x = StraightThrough.apply(x, self.grid.fake(x.detach()))
            y = x
            if selection is not None:
                y = ramped(selection, x.shape[-1], self._ramp).apply(x, self.straight_through)
            if not torch.compiler.is_compiling():
                nonlocal calls
                if calls % COUNT_EVERY == 0:
                    self._zeros.setdefault(role, []).append((y.detach() == 0).float().mean())
                calls += 1
            return y

        return rule

    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not self.end:
            return
        passed = ((step + 1) / self.steps - self.begin) / (self.end - self.begin)
        ramp = round(RAMP_STEPS * min(max(passed, 0.0), 1.0))
        if ramp != self._ramp:
            self._ramp = ramp
            torch.compiler.reset()  # or it would give up on a function that it has compiled eight times

    def state(self) -> dict[str, Tensor]:
        return {"ramp": torch.tensor(self._ramp)} if self.end else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.end:
            self._ramp = int(state["ramp"])

    def metrics(self) -> dict[str, float]:
        """``zeros_ROLE``: fraction of inputs that are zero, the mean since last asked; nothing in a compiled model."""
        found = {f"zeros_{role}": float(torch.stack(shares).mean()) for role, shares in self._zeros.items() if shares}
        self._zeros.clear()
        return found

    def describe(self, linears: Mapping[str, LinearState]) -> None:
        for name in self.linears:
            state = linears[name]
            state.input_selection = self.selections.get(name)
            state.input_grid = self.grid or state.input_grid


def ramped(selection: Selection, channels: int, ramp: int) -> Selection:
    """The selection that drops ``ramp`` of ``RAMP_STEPS`` parts of what ``selection`` drops of ``channels`` inputs."""
    if ramp == RAMP_STEPS or selection.keep is None:
        return selection
    units, kept = (selection.block or channels) // selection.unit, selection.keep // selection.unit
    return replace(selection, keep=selection.unit * (units - (units - kept) * ramp // RAMP_STEPS))


def set_activation(model: nn.Module, activation: str) -> None:
    """Exchanges the activation of a transformers model's gated feed-forwards, in its config too.

    Raises ``UserError`` for a model without any.
    """
    config: Any = model.config
    config.hidden_act = activation
    found = [module for module in model.modules() if hasattr(module, "act_fn") and hasattr(module, "gate_proj")]
    if not found:
        raise UserError(f"expected gated feed-forwards with act_fn, found none in {type(model).__name__}")
    for module in found:
        module.act_fn = ACT2FN[activation]  # type: ignore[assignment]
