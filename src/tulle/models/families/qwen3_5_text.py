"""Qwen 3.5 and 3.6, dense, text: three layers of gated delta nets to one of gated attention, a quarter of whose heads'
channels are rotated. Qwen 2026."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder
from tulle.models.families._parts import gated
from tulle.models.families._qwen import hybrid_decoder, skip_unread


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    skip_unread(keys)
    return hybrid_decoder(
        keys,
        hidden=4096,
        layers=32,
        kv_heads=4,
        vocabulary=248320,
        feed_forward=lambda keys, hidden, layers: gated(keys, keys.size("intermediate_size", 12288)),
    )
