"""Gemma 4 in GGUF files: layers with a window have narrower heads and a rotary table of their own, the last ones share
keys and values and may have wider feed-forwards, and layers may have inputs of their own.

llama.cpp rotates all channels of the wide heads, and divides the frequencies of those that stay as they are by 1e30
(``rope_freqs``): what transformers calls a proportional table.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.gguf import names

MODULES: dict[str, str | None] = {
    "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
}  # fmt: skip
OUTER: dict[str, str | None] = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
EXPERTS: dict[str, str | None] = {
    "ffn_gate_inp": "router.proj", "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1", "post_ffw_norm_2": "post_feedforward_layernorm_2",
}  # fmt: skip
SCALES = {"ffn_gate_inp.scale": "router.scale", "ffn_down_exps.scale": "router.per_expert_scale"}
BARE = {"layer_output_scale.weight": "layer_scalar"}
STILL = 1e29
"""Factors from here on: channels that are not rotated."""


class Keys(Protocol):
    def get(self, key: str, default: Any = None) -> Any: ...
    def size(self, key: str, default: int | None = None) -> int: ...
    def number(self, key: str, default: float) -> float: ...
    def refused(self, key: str, expected: str, found: object) -> UserError: ...


def layers_differ(
    keys: Keys,
    config: Mapping[str, Any],
    stored: Container[str],
    rope: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """What a config says of layers that differ; ``config``: what has been read, with ``layer_types``."""
    kinds: list[str] = config["layer_types"]
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        raise keys.refused("attention.sliding_window_pattern", "a layer without a window", "none")
    narrow = keys.size("attention.key_length_swa", config["head_dim"])
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if keys.size(key, narrow) != narrow:
            raise keys.refused(key, f"{narrow}, as many channels as a key has", keys.get(key))
    shared = keys.get("attention.shared_kv_layers", 0)
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < len(kinds):
        raise keys.refused("attention.shared_kv_layers", f"a number from 0 to {len(kinds) - 1}", shared)
    own = len(kinds) - shared
    if shared and kinds[max(own - 2, 0) : own] != ["sliding_attention", "full_attention"]:
        # llama.cpp looks for the keys there.
        expected = "a layer with a window and one without before those that share keys"
        raise keys.refused("attention.sliding_window_pattern", expected, kinds)
    kv_heads = _by_layer(keys, "attention.head_count_kv", len(kinds))
    wide_heads, narrow_heads = _one(kv_heads, full), _one(kv_heads, [i for i in range(len(kinds)) if i not in full])
    widths = _by_layer(keys, "feed_forward_length", len(kinds))
    inner, double = _one(widths, range(own)), _one(widths, range(own, len(kinds)))
    if wide_heads is None:
        raise keys.refused("attention.head_count_kv", "one number for all layers without a window", kv_heads)
    if inner is None or (shared and double not in (inner, 2 * inner)):
        raise keys.refused("feed_forward_length", "one number, or twice that where keys are shared", widths)
    own_input = keys.get("embedding_length_per_layer_input", 0)
    return {
        "head_dim": narrow,
        "global_head_dim": config["head_dim"],
        "num_key_value_heads": wide_heads if narrow_heads is None else narrow_heads,
        "num_global_key_value_heads": wide_heads,
        "attention_k_eq_v": all(f"blk.{index}.attn_v.weight" not in stored for index in full if index < own),
        "num_kv_shared_layers": shared,
        "intermediate_size": inner,
        "use_double_wide_mlp": double is not None and double != inner,
        "hidden_size_per_layer_input": keys.size("embedding_length_per_layer_input") if own_input else 0,
        "vocab_size_per_layer_input": config["vocab_size"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)},
            "full_attention": _proportional(config, rope.get(names.ROPE)),
        },
    }


def _by_layer(keys: Keys, key: str, layers: int) -> list[int]:
    found = keys.get(key)
    numbers = found.tolist() if isinstance(found, np.ndarray) else [found] * layers
    if len(numbers) != layers or not all(type(one) is int and one > 0 for one in numbers):
        raise keys.refused(key, f"a positive number, or one for each of {layers} layers", found)
    return numbers


def _one(numbers: Sequence[int], of: Sequence[int]) -> int | None:
    """The number that these layers have; None where there is no layer, or where they differ."""
    found = {numbers[index] for index in of}
    return found.pop() if len(found) == 1 else None


def _proportional(config: Mapping[str, Any], factors: NDArray[np.float32] | None) -> dict[str, Any]:
    """The table of layers without a window. Raises ``UserError`` for factors that no such table has."""
    pairs = config["head_dim"] // 2
    factors = np.ones(pairs, np.float32) if factors is None else factors
    rotated = int((factors == 1).sum())
    if len(factors) != pairs or (factors[:rotated] != 1).any() or (factors[rotated:] < STILL).any():
        raise UserError(
            f"expected {names.ROPE} of {pairs} factors, ones and then 1e30, in a file of Gemma 4, found {factors!r:.80}"
        )
    theta = config["rope_theta"]
    return {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": rotated / pairs}
