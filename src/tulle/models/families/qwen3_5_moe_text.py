"""Qwen 3.5 and 3.6 with experts, text: the layers of the dense models, with small experts and a shared one with a gate.
Qwen 2026."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder
from tulle.models.families._qwen import feed_forwards, hybrid_decoder, skip_unread


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    skip_unread(keys)
    return hybrid_decoder(
        keys,
        hidden=2048,
        layers=40,
        kv_heads=2,
        vocabulary=248320,
        feed_forward=lambda keys, hidden, layers: feed_forwards(
            keys, hidden, layers, None, 512, experts=256, chosen=8, shared=512, normalise=None
        ),
    )
