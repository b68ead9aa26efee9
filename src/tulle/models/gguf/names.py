"""Names of tensors in GGUF files and in Hugging Face folders, and the order of q's and k's rows.

llama.cpp rotates neighbouring channels (2i, 2i+1) of Llama's heads, transformers channels i and i + d/2. Converters
store q and k of such files with the rows of every head in llama.cpp's order; here they are put back. Rows are whole
blocks, so that nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of a layer's modules: ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``."""
ROPE = "rope_freqs.weight"
GATE_UP = "ffn_gate_up_exps.weight"
"""Gate and up of all experts."""
ONE_OUTPUT = "ffn_gate_inp_shexp.weight"
"""A linear of one output, which may be stored as a vector."""
CONVOLUTIONS = ("ssm_conv1d.weight", "shortconv.conv.weight")
"""Stored without the axis of length 1 that they have in a folder."""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""What frequencies are divided by: of Llama 3, and of longrope for long and short texts."""


class Names:
    """Names of one family's tensors. ``renamed``: its modules that ``LAYER`` calls otherwise, or does not have; a name
    of None is a module that it lacks. ``biased``: GGUF's names of modules that may have a bias. ``stacks``: of modules
    that hold all experts of a layer, their own names with {} for the expert's number. ``bare``: of tensors that are no
    module's weight, such as ``attn_sinks.weight``. ``outer``: of modules outside of the layers, as ``renamed``."""

    def __init__(
        self,
        renamed: Mapping[str, str | None],
        biased: tuple[str, ...],
        stacks: Mapping[str, str] | None = None,
        bare: Mapping[str, str] | None = None,
        outer: Mapping[str, str | None] | None = None,
    ):
        renamed = {**renamed, **(outer or {})}
        self._outer = OUTER.keys() | (outer or {}).keys()
        named = {**OUTER, **LAYER, **renamed}
        taken = [one for one in renamed.values() if one is not None]
        self._ours = {
            theirs: ours for theirs, ours in named.items() if ours and (ours not in taken or theirs in renamed)
        }
        self._theirs = {ours: theirs for theirs, ours in self._ours.items()}
        self._biased = biased
        self._stacks, self._bare = stacks or {}, bare or {}
        self._bare_theirs = {ours: theirs for theirs, ours in self._bare.items()}
        self._stack_theirs = {ours: theirs for theirs, ours in self._stacks.items()}

    def ours(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor; None where the family has none."""
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if match is not None and match[2] in self._bare:
            return f"model.layers.{int(match[1])}.{self._bare[match[2]]}"
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([\w.]+)\.(weight|bias)", name)
        if match is None or (match[1] is None) != (match[2] in self._outer) or match[2] not in self._ours:
            return None
        if match[3] == "bias" and match[2] not in self._biased:
            return None
        layer = "" if match[1] is None else f"model.layers.{int(match[1])}."
        return f"{layer}{self._ours[match[2]]}.{match[3]}"

    def theirs(self, name: str) -> str | None:
        """The GGUF name of a Hugging Face tensor; None where the family has none."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is not None and match[2] in self._bare_theirs:
            return f"blk.{int(match[1])}.{self._bare_theirs[match[2]]}"
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match is None or match[2] not in self._theirs:
            return None
        layer = "" if match[1] is None else f"blk.{int(match[1])}."
        found = f"{layer}{self._theirs[match[2]]}.{match[3]}"
        return found if self.ours(found) == name else None

    def experts(self, name: str) -> str | None:
        """The Hugging Face name, with {} for the expert's number, of the parts of a GGUF tensor that holds all experts;
        None of any other tensor."""
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in self._stacks or match[3] == "bias" and match[2] not in self._biased:
            return None
        return f"model.layers.{int(match[1])}.{self._stacks[match[2]]}.{match[3]}"

    def stack(self, name: str) -> tuple[str, int] | None:
        """The GGUF tensor that an expert's tensor is a part of, and the expert's number; None of any other tensor."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\d+)\.(\w+)\.(weight|bias)", name)
        theirs = None if match is None else self._stack_theirs.get(f"{match[2]}.{{}}.{match[4]}")
        if match is None or theirs is None or match[5] == "bias" and theirs not in self._biased:
            return None
        return f"blk.{int(match[1])}.{theirs}.{match[5]}", int(match[3])


def layer_of(name: str) -> int | None:
    """The number of the layer that a GGUF tensor belongs to."""
    match = re.match(r"blk\.(\d+)\.", name)
    return None if match is None else int(match[1])


def is_permuted(name: str) -> bool:
    """Whether a tensor (by its GGUF name) is one of those whose rows a family may store in ggml's order."""
    return re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", name) is not None


def restored_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Which stored row each row of the Hugging Face tensor is: channel i + j·d/2 of a head is stored at 2i + j."""
    stored = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return np.ascontiguousarray(stored.transpose(0, 2, 1)).reshape(-1)


def stored_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """The inverse of :func:`restored_rows`."""
    return np.argsort(restored_rows(heads, head_dim))
