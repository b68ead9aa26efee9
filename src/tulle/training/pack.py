"""From a trained model to a folder that says how it computes: quantised weights, rounded and sparse inputs.

Training leaves plain weights and, where methods ``describe`` more than that, states of the linears; packed like a
compressed model's, so that ``tulle.load``, the evaluation, the exporters and the engine see what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.hf.pack import input_tensors, packed_tensors, spec_of
from tulle.methods.contract import LinearState
from tulle.methods.train.method import TrainingMethod
from tulle.models.checkpoint import Checkpoint, write_shard, write_text

MASKED_FROM = 0.1
"""Fraction of zeros from which a weight that training left so is stored with a mask."""


def pack(folder: Path, methods: Sequence[TrainingMethod]) -> bool:
    """Packs the dense folder of a trained model in place, as ``methods`` describe it; False where nothing needs it.

    Weights are taken in the dtype in which they are stored. Raises ``UserError`` for a folder of several shards.
    """
    methods = [method for method in methods if method.describes]
    if not methods:
        return False
    checkpoint = Checkpoint.open(folder)
    files = {checkpoint.info(name).file for name in checkpoint.names()}
    if len(files) > 1:
        raise UserError(f"expected one file of weights in {folder.name}, found {len(files)}; save it unsharded")
    model = checkpoint.describe()
    stored = {name: checkpoint.read(name) for name in checkpoint.names()}
    states = {}
    for name in (name for layer in model.layers for name in model.linear_names(layer.index)):
        weight = stored[f"{name}.weight"].float()
        states[name] = LinearState(name, weight, weight, model.role_of(name) or "")
    for method in methods:
        method.describe(states)
    dtypes = {name: stored[f"{name}.weight"].dtype for name in states}
    changed = [name for name, state in states.items() if _says_more(state)]
    if not changed:
        return False
    specs: dict[str, LinearSpec] = {}
    for name in changed:
        specs[name], tensors = _packed(states[name], dtypes[name])
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    (file,) = files
    write_shard(file, stored)
    recipe = {"trained": [type(method).__name__ for method in methods]}
    config = checkpoint.config | {"quantization_config": QuantizationConfig(specs, recipe).to_json()}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return True


def _says_more(state: LinearState) -> bool:
    return state.quantised is not None or state.input_grid is not None or state.input_selection is not None


def _packed(state: LinearState, dtype: torch.dtype) -> tuple[LinearSpec, Mapping[str, Tensor]]:
    zeros = state.weight == 0
    if state.quantised is None and float(zeros.float().mean()) >= MASKED_FROM:
        state.mask = ~zeros
    spec = spec_of(state, dtype)
    return spec, packed_tensors(state, spec, dtype) | input_tensors(state)
