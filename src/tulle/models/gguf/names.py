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

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
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
GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""What Gemma's modules are called, where ``LAYER`` says otherwise or nothing."""
ROPE = "rope_freqs.weight"
BACK = {ours: theirs for theirs, ours in LAYER.items()} | {ours: theirs for theirs, ours in OUTER.items()}


def ours(name: str, renamed: Mapping[str, str] | None = None) -> str | None:
    """The Hugging Face name of a GGUF tensor; None where there is none. ``renamed``: a family's own names."""
    if name in OUTER:
        return OUTER[name]
    match, modules = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name), LAYER | dict(renamed or {})
    if match is None or match[2] not in modules:
        return None
    return f"model.layers.{int(match[1])}.{modules[match[2]]}.{match[3]}"


def theirs(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor; None where there is none."""
    if name in BACK:
        return BACK[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in BACK:
        return None
    return f"blk.{int(match[1])}.{BACK[match[2]]}.{match[3]}"


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
