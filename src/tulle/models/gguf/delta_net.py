"""Gated delta nets in GGUF files of Qwen 3.5: the heads of values stand in another order there.

In a folder, the value heads that share a key head follow each other: head r of key head k is number k·R + r. Converters
store it at r·K + k. Rows (and the output linear's columns) are whole blocks of a quantised type, so that putting them
back rounds nothing. A_log is stored as −e^A_log.

Files of Qwen3-Next have the folder's order, and b and a in one tensor: of every key head its value heads' b, then a.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError

NAMES: dict[str, str | None] = {
    "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z", "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b", "ssm_conv1d": "linear_attn.conv1d", "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}  # fmt: skip
DECAY, CONVOLUTION, OUTPUT, NORM = "ssm_a", "ssm_conv1d.weight", "ssm_out.weight", "ssm_norm.weight"
BARE = {"ssm_dt.bias": "linear_attn.dt_bias", DECAY: "linear_attn.A_log"}
BOTH = "ssm_ba.weight"
PARTS_OF_BOTH = ("linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight")
ALL_INPUTS = ("attn_qkv.weight", CONVOLUTION)
"""Queries and keys, whose order stays, and then values."""
PER_HEAD = ("ssm_alpha.weight", "ssm_beta.weight", "ssm_dt.bias", DECAY)
OF_VALUES = ("attn_gate.weight", OUTPUT)


def order(theirs: str, config: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """Which stored row (of the output linear: column) each one of the folder's is; None where nothing moves."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    wide, module = config["linear_value_head_dim"], theirs.split(".", 2)[-1]
    if keys == values:
        return None
    if values % keys:
        raise UserError(f"expected value heads in equal groups of {keys}, found {values}; convert the file again")
    heads = np.arange(values).reshape(values // keys, keys).T.reshape(-1)
    channels = (heads[:, None] * wide + np.arange(wide)).reshape(-1)
    if module in PER_HEAD:
        return heads
    if module in OF_VALUES:
        return channels
    if module in ALL_INPUTS:
        before = 2 * keys * config["linear_key_head_dim"]
        return np.concatenate([np.arange(before), before + channels])
    return None


def decay(stored: NDArray[np.float32], theirs: str) -> NDArray[np.float32]:
    """A_log. Raises ``UserError`` for a state that would grow."""
    if not (stored < 0).all():
        raise UserError(f"expected numbers below 0 in {theirs}, found others; the file is damaged, copy it again")
    return np.log(-stored)
