"""How fast a model runs here, and how near that is to what the memory can give."""

from __future__ import annotations

import statistics
import time
from typing import TypedDict

from tulle import _native
from tulle.engine.model import Engine
from tulle.errors import UserError

BANDWIDTH_BYTES = 1 << 29


class Speed(TypedDict):
    """What ``tulle bench`` prints; tokens/s are medians."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    weight_bytes: int
    read_bytes: float
    """What of these a token reads: weights of inputs that it leaves out are skipped where they are input-major."""
    cache_bytes: int
    bandwidth_gb_s: float
    """Weights that decoding reads per second, 10⁹ bytes."""
    read_gb_s: float
    """What as many threads reach that only read."""
    threads: int
    isa: str
    layout: str
    prompt: int
    tokens: int


def measure(engine: Engine, prompt: int = 512, tokens: int = 64, rounds: int = 5) -> Speed:
    """Prefill of ``prompt`` tokens and decoding of ``tokens`` after it, ``rounds`` times, after one to warm up.

    Raises ``UserError`` where they do not fit into the context.
    """
    if min(prompt, tokens, rounds) < 1:
        raise UserError("expected at least one prompt token, one token to decode and one round, found fewer")
    if prompt + tokens > engine.context:
        raise UserError(f"expected prompt and tokens within the context of {engine.context}, found {prompt + tokens}")
    ids = [i * 7919 % engine.vocabulary for i in range(prompt)]
    prefill, decode = [], []
    engine.take_bytes_per_token()
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        logits = engine.forward(ids, 0, 0, [prompt - 1])
        first = time.perf_counter()
        for position in range(prompt, prompt + tokens):
            logits = engine.forward([int(logits[0].argmax())], 0, position)
        ended = time.perf_counter()
        prefill.append(first - begun)
        decode.append((ended - first) / tokens)
    per_token, read = statistics.median(decode[1:]), engine.take_bytes_per_token()
    return Speed(
        prefill_tokens_per_s=prompt / statistics.median(prefill[1:]),
        decode_tokens_per_s=1 / per_token,
        weight_bytes=engine.weight_bytes,
        read_bytes=read,
        cache_bytes=engine.cache_bytes,
        bandwidth_gb_s=read / per_token / 1e9,
        read_gb_s=_native.read_bandwidth(BANDWIDTH_BYTES, engine.threads, 5) / 1e9,
        threads=engine.threads,
        isa=_native.active_isa(),
        layout=engine.layout,
        prompt=prompt,
        tokens=tokens,
    )
