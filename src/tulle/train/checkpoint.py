"""Training checkpoints: everything a resumed run needs to follow the same curve, without pickle.

A checkpoint is a folder ``step-000250`` with ``model.safetensors`` (fp32), ``optimizer.safetensors`` (every
state tensor, and torch's generator state) and ``state.json``. It is written under another name and renamed
when it is complete, so that a folder of that name is always whole. The data position is the step itself
(see ``tokens.Windows``).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

_GENERATOR = "generator"


def save(folder: Path, step: int, recipe: dict, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write ``folder/step-…`` atomically and drop older ones."""
    target = folder / f"step-{step:06d}"
    partial = folder / f"partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"))
    tensors = {_GENERATOR: torch.get_rng_state()}
    for index, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"{index}.{number}.{name}"] = value.contiguous()
    save_file(tensors, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "recipe": recipe}, indent=1) + "\n")
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


def read_state(checkpoint: Path) -> tuple[int, dict]:
    """(step, recipe) of a checkpoint."""
    state = json.loads((checkpoint / "state.json").read_text())
    return state["step"], state["recipe"]


def load(checkpoint: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put a checkpoint's weights, optimizer states and generator state back."""
    load_model(model, str(checkpoint / "model.safetensors"))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop(_GENERATOR))
    for index, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            owner, number, name = key.split(".")
            if int(owner) == index:
                state.setdefault(int(number), {})[name] = value
        content["state"] = state
        optimizer.load_state_dict(content)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
