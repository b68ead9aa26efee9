"""Model folders on the way through a training run: always dense, so that the next stage can start from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tulle.errors import UserError
from tulle.export import dense
from tulle.export.folder import whole_folder, write_entries
from tulle.hf import load_checkpoint, packed_linears, require_packed_tensors
from tulle.models.checkpoint import Checkpoint, copy_companions, write_text
from tulle.models.hub import local_folder


def dense_folder(model: str, work: Path) -> Path:
    """The folder of a model (a folder, ``reference`` or a hub id), unpacked into ``work`` if it is a packed one.

    Raises ``UserError`` for a model that is not there.
    """
    folder = local_folder(model)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.source.plain and checkpoint.packed is None:
        return folder
    if not work.exists():
        unpack(folder, work)
    return work


def unpack(packed: Path, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a packed or otherwise stored model as a dense checkpoint in ``dtype``; what was pruned is exactly zero."""
    checkpoint = Checkpoint.open(packed)
    linears = {} if checkpoint.packed is None else packed_linears(checkpoint)
    require_packed_tensors(checkpoint, linears)
    plan = dense.plan(checkpoint, linears, dtype)
    with whole_folder(target) as folder:
        write_entries(folder, plan.entries, lambda done, total: None)
        copy_companions(checkpoint.source.tokenizer, folder)
        write_text(folder / "config.json", json.dumps(plan.config, indent=2) + "\n")


def load_dense(folder: Path, context: int = 0) -> PreTrainedModel:
    """A dense checkpoint in float32.

    Raises ``UserError`` for what transformers cannot load, and for a model whose context is shorter than ``context``
    tokens.
    """
    try:
        model = load_checkpoint(Checkpoint.open(folder), torch.float32)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or ["nothing"])[0]
        raise UserError(f"expected a model that transformers loads in {folder}, found: {line}") from None
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise UserError(
            f"expected a context of at most the model's {longest} tokens, found {context}; set training.context"
        )
    return model


def save_dense(weights: dict[str, Tensor], config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes weights by name as a transformers checkpoint in ``dtype``."""
    model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False)} - set(weights)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.to(dtype).save_pretrained(folder)


def sparsity(model: nn.Module) -> float:
    """Fraction of exact zeros in the decoder's linears."""
    zeros = total = 0
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            zeros += int((module.weight == 0).sum())
            total += module.weight.numel()
    return zeros / max(total, 1)
