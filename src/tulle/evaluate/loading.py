"""A model for evaluation: dense or compressed, from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tulle.errors import UserError


def load_model(folder: Path, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a local folder.

    ``dtype`` is that of activations and unpacked tensors. Raises ``UserError`` for a broken folder, an unknown dtype or
    a device that is not here.
    """
    import torch
    from transformers import AutoTokenizer

    from tulle.hf import load_checkpoint
    from tulle.machine import require_device
    from tulle.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)  # config, shards and headers, with messages of our own
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"expected a dtype such as float32 or bfloat16, found {dtype!r}; try --dtype float32")
    require_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.tokenizer, local_files_only=True)
        model = load_checkpoint(checkpoint, getattr(torch, dtype))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"expected a model that transformers can load in {folder}, found: {line}") from error
    return model.eval().to(device), tokenizer
