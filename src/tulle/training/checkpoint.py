"""Training checkpoints: everything a resumed run needs to follow the same curve, without pickle.

A checkpoint is a folder ``step-000250`` with ``model.safetensors`` (fp32), ``optimizer.safetensors`` (every
state tensor, and torch's generator state), ``methods.safetensors`` (what training methods remember) and ``state.json``.
It holds whole tensors, whatever shards them, so that a run may go on with another number of processes. It is written
under another name and renamed when it is complete, so that a folder of that name is always whole. The data position is
the step itself (see ``corpus.Windows``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tulle.methods.train.method import TrainingMethod, local, whole

_GENERATOR = "generator"


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; a wrapper's prefix is not part of it."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter as a whole tensor on the CPU; all processes must ask."""
    return {name: whole(p.detach()).cpu().contiguous() for name, p in parameters(model).items()}


def save(
    folder: Path,
    step: int,
    facts: dict[str, Any],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    methods: Sequence[TrainingMethod] = (),
    main: bool = True,
) -> None:
    """Write ``folder/step-…`` atomically and drop older ones. All processes gather; the ``main`` one writes.

    ``facts``: what :func:`read_state` gives back, JSON: the recipe of ``tulle train``, sums of ``tulle recover``.
    """
    names: dict[Tensor, str] = {p: name for name, p in parameters(model).items()}
    model_tensors = weights(model)
    states: dict[str, Tensor] = {_GENERATOR: torch.get_rng_state()}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                states[f"{index}.{names[parameter]}.{name}"] = whole(torch.as_tensor(value)).cpu().contiguous()
    remembered = {
        f"{number}.{name}": tensor.cpu().contiguous()
        for number, method in enumerate(methods)
        for name, tensor in method.state().items()
    }
    if not main:
        return
    target = folder / f"step-{step:06d}"
    partial = folder / f"partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(model_tensors, partial / "model.safetensors")
    save_file(states, partial / "optimizer.safetensors")
    save_file(remembered, partial / "methods.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "facts": facts}, indent=1) + "\n")
    for file in [*partial.iterdir(), partial]:
        _sync(file)
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
    _sync(folder)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    return max(folder.glob("step-*"), default=None)


def read_state(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """(step, facts) of a checkpoint."""
    state = json.loads((checkpoint / "state.json").read_text())
    # Up to version 0.1 there was nothing but a recipe.
    return state["step"], state["facts"] if "facts" in state else state["recipe"]


@torch.no_grad()
def load(
    checkpoint: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    methods: Sequence[TrainingMethod] = (),
) -> int:
    """Puts a checkpoint's weights, optimizer states, methods and generator state back; returns its step."""
    named = parameters(model)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        local(named[name]).copy_(local(_placed_like(tensor, named[name])))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop(_GENERATOR))
    for key, value in tensors.items():
        index, _, rest = key.partition(".")
        owner, _, name = rest.rpartition(".")
        parameter = named[owner]
        # A count of steps stays on the CPU unless the optimizer is fused.
        optimizer = optimizers[int(index)]
        placed = value if value.ndim == 0 and not _fused(optimizer) else _placed_like(value, parameter)
        optimizer.state[parameter][name] = placed
    remembered = load_file(checkpoint / "methods.safetensors")
    for number, method in enumerate(methods):
        own: Mapping[str, Tensor] = {
            key.partition(".")[2]: value for key, value in remembered.items() if key.partition(".")[0] == str(number)
        }
        method.load_state(own)
    return read_state(checkpoint)[0]


def _placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of a parameter's shape, sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(parameter.device)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
