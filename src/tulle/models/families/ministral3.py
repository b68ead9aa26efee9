"""Ministral 3: Mistral with queries that grow with their position, and yarn. Mistral AI 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys, positive
from tulle.models.description import Attention, Decoder
from tulle.models.families._parts import gated_decoder, head_sizes, read_rotary

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Rotary parameters of a config that gives none."""


def describe(config: Mapping[str, Any]) -> Decoder:
    if config.get("rope_parameters") is None:
        config = {**config, "rope_parameters": YARN}
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32, kv_heads=8, head_dim=128)
    context = keys.size("max_position_embeddings", 262144)
    rotary = read_rotary(keys, head_dim, context, also=("llama_4_scaling_beta", "max_position_embeddings"))
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        window=keys.size_or_none("sliding_window", None),
        position_scale=_position_scale(keys),
    )
    return gated_decoder(
        keys,
        hidden=hidden,
        intermediate=keys.size("intermediate_size", 14336),
        attention=[attention] * keys.size("num_hidden_layers", 34),
        rotary=rotary,
        context=context,
        vocabulary=keys.size("vocab_size", 131072),
        eps=keys.number("rms_norm_eps", 1e-5),
    )


def _position_scale(keys: ConfigKeys) -> tuple[float, int]:
    inside = keys.raw("rope_scaling") or keys.raw("rope_parameters")
    original = inside.get("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise keys.refused("original_max_position_embeddings", "a positive whole number", original)
    return positive(inside.get("llama_4_scaling_beta"), "llama_4_scaling_beta"), original
