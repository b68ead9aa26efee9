"""One decoder block at a time, run by transformers' own code.

A model of a single layer is built without weights (on the meta device), the block's tensors are assigned to it, and
hidden states go in and come out. Masks, rotary embeddings and sliding windows are transformers' business, so that
every architecture of the table runs unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from tulle.errors import UserError


class Block:
    """Decoder block ``index`` with weights: hidden ``[B, T, d]`` → hidden ``[B, T, d]``, causal.

    ``attention`` names the attention function of transformers; weights and activations inside are in ``dtype``.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        index: int,
        tensors: Mapping[str, Tensor],
        device: str = "cpu",
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
    ):
        single = copy.deepcopy(config)
        single.num_hidden_layers = 1
        types = getattr(config, "layer_types", None)
        if types is not None:
            single.layer_types = [types[index]]
        single.use_cache = False
        with torch.device("meta"):
            self._model: Any = AutoModel.from_config(single, attn_implementation=attention)
        self.module: nn.Module = self._model.layers[0]
        self.module.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, assign=True)
        self._model.norm = nn.Identity()
        self._dtype = dtype
        self._model.embed_tokens = None
        self._model.rotary_emb = type(self._model.rotary_emb)(single).to(device)
        self._model.requires_grad_(False).eval()

    def to(self, dtype: torch.dtype) -> None:
        """From now on weights and activations inside are in ``dtype``."""
        self.module.to(dtype)
        self._dtype = dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._model(inputs_embeds=hidden.to(self._dtype), use_cache=False).last_hidden_state.to(hidden.dtype)


def load_config(folder: Path) -> PretrainedConfig:
    """The transformers config of a local folder; never looks at the network, never runs remote code."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"expected a config.json that transformers accepts in {folder}, found: {line}") from None


def require_device(device: str) -> None:
    """Raises ``UserError`` for a device that torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"expected a device that torch has here, found {device!r} ({str(error).splitlines()[0]}); try cpu"
        ) from None
