"""The protocol between a training loop and a method that acts on the weights or on the loss.

A loop calls, in this order:

- ``prepare`` once, on the plain model, before optimizers are built and before it is wrapped (DDP, FSDP2, compile);
- ``loss_terms`` for every micro-batch, to be added to the loss;
- ``after_backward`` once per optimizer step, when gradients are complete and before they are clipped;
- ``after_step`` once per optimizer step, after the optimizers';
- ``finish`` at the end, which leaves a plain model with the weights that the method stands for.

In anyone's own loop::

    masks = HeldMasks()
    masks.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, batch in enumerate(batches):
        outputs = model(**batch)
        (outputs.loss + sum(masks.loss_terms(batch, outputs).values())).backward()
        masks.after_backward(step)
        optimizer.step()
        masks.after_step(step, [optimizer])
        optimizer.zero_grad()
    masks.finish()

``callback.MethodCallback`` does the same inside transformers' ``Trainer``. A method is a dataclass of settings, so that
a recipe can name it (``METHODS``); its state while training are plain attributes.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tulle.errors import UserError
from tulle.methods.contract import LinearState
from tulle.models.description import ROLES, describe

METHODS: dict[str, str] = {
    "held_masks": "tulle.methods.train.masks:HeldMasks",
    "gradual_magnitude": "tulle.methods.train.masks:GradualMagnitude",
    "ste": "tulle.methods.train.sr_ste:STE",
    "sr_ste": "tulle.methods.train.sr_ste:SRSTE",
    "s_ste": "tulle.methods.train.sr_ste:SSTE",
    "step": "tulle.methods.train.sr_ste:STEP",
    "top_kast": "tulle.methods.train.top_kast:TopKAST",
    "squarehead": "tulle.methods.train.squarehead:SquareHead",
    "bitnet": "tulle.methods.train.bitnet:BitNet",
    "q_sparse": "tulle.methods.train.q_sparse:QSparse",
}
"""Name in a training recipe → settings class, imported when a recipe asks for it."""


DOES = {
    "mask": "chooses or holds the mask",
    "forward": "puts other weights into the forward pass",
    "selection": "selects inputs",
}
"""What two methods cannot both do to one role, in a message."""


@dataclasses.dataclass(eq=False)
class TrainingMethod:
    """A method that does nothing; subclasses override what they need."""

    targets: tuple[str, ...] = ROLES
    """Roles of the linears it acts on. Embeddings, norms and the output head are never among them."""

    hidden_states: ClassVar[bool] = False
    """``loss_terms`` wants the model's outputs with ``hidden_states``."""
    sharded: ClassVar[bool] = True
    """Works when FSDP2 has sharded the weights."""
    settles: ClassVar[frozenset[str]] = frozenset()
    """Keys of :data:`DOES`: what no other method of a stage may do to the same role."""

    def __post_init__(self) -> None:
        for role in self.targets:
            if role not in ROLES:
                raise UserError(f"expected targets of {', '.join(ROLES)}, found {role!r}; correct the recipe")
        self.linears: dict[str, nn.Linear] = {}

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        """Takes hold of the linears. ``steps``: optimizer steps of the whole training, for methods with a schedule.

        ``linears`` by name, for a model that ``tulle.models.families`` does not know; otherwise the ``targets``.
        Raises ``UserError`` for an unknown architecture, and for a model that the method cannot train.
        """
        self.steps = steps
        self.linears = dict(linears) if linears is not None else target_linears(model, self.targets)

    def loss_terms(self, inputs: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """Scalars to add to the loss of a micro-batch (nats per token), by name.

        ``inputs`` are the model's keyword arguments (``input_ids`` ``[B, T]``), ``outputs`` what it returned for them.
        """
        return {}

    def after_backward(self, step: int) -> None:
        """Gradients of step ``step`` (from 0) are complete and not clipped yet."""

    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """The optimizers have made step ``step``."""

    def metrics(self) -> dict[str, float]:
        """Figures for the log, about the time since they were last asked for."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and optimizer states; whole tensors, the same on every process."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts :meth:`state` back, after :meth:`prepare` on an equal model."""

    def finish(self) -> None:
        """Leaves plain linears with the weights that the method stands for."""

    @property
    def describes(self) -> bool:
        """Whether :meth:`describe` says anything: plain weights are not all that the method leaves."""
        return type(self).describe is not TrainingMethod.describe

    def describe(self, linears: Mapping[str, LinearState]) -> None:
        """Says of its linears, after :meth:`finish`, what a plain weight cannot: that they are quantised, or that
        their inputs are rounded or left out. The model is then written in the packed format."""


def method_class(name: str) -> type[TrainingMethod]:
    """The settings class of a name. Raises ``UserError`` for an unknown one."""
    if name not in METHODS:
        raise UserError(f"expected a training method of {', '.join(METHODS)}, found {name!r}; correct the recipe")
    module, attribute = METHODS[name].split(":")
    found: type[TrainingMethod] = getattr(importlib.import_module(module), attribute)
    return found


def target_linears(model: nn.Module, targets: Sequence[str] = ROLES) -> dict[str, nn.Linear]:
    """The decoder linears of these roles by full name. Raises ``UserError`` for an unknown architecture."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UserError("expected a transformers model, found one without a config; pass linears={name: module}")
    found: dict[str, nn.Linear] = {}
    for layer in describe(config.to_dict()).layers:
        for name in (layer.prefix + name for group in layer.groups if group.role in targets for name in group.names):
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise UserError(f"expected a linear at {name}, found {type(module).__name__}; load the dense model")
            found[name] = module
    return found


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP2 may have sharded, along the first dimension."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_like(tensor: Tensor, model: Tensor) -> Tensor:
    """The part of a whole ``tensor`` that belongs to this process's part of ``model``, which has the same shape."""
    if not isinstance(model, DTensor):
        return tensor
    if not tensor.is_floating_point():
        return distribute_tensor(tensor.float(), model.device_mesh, model.placements).to_local().to(tensor.dtype)
    return distribute_tensor(tensor, model.device_mesh, model.placements).to_local()


def optimizer_state(parameter: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizer's tensors of the parameter's shape (exp_avg, exp_avg_sq, momentum_buffer), this process's part."""
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[name] = local(value)
    return found
