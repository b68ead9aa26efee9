"""Qwen3-Next: gated delta nets, whose inputs' heads stand side by side, to gated attention three to one; many small
experts and a shared one with a gate. Qwen 2025."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder
from tulle.models.families._qwen import feed_forwards, hybrid_decoder


def describe(config: Mapping[str, Any]) -> Decoder:
    return hybrid_decoder(
        ConfigKeys(config),
        hidden=2048,
        layers=48,
        kv_heads=2,
        vocabulary=151936,
        feed_forward=lambda keys, hidden, layers: feed_forwards(
            keys, hidden, layers, 5632, 512, experts=512, chosen=10, shared=512, normalise=True
        ),
        fused=True,
    )
