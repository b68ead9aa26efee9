"""How fast a model runs here, and how near that is to what the memory can give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

from tulle import _native
from tulle.engine.model import Engine
from tulle.errors import UserError

BANDWIDTH_BYTES = 1 << 29
PROMPT, TOKENS = 512, 64
"""Tokens of the prompt and to decode, where nothing else is asked."""


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


def fitting(context: int, prompt: int | None, tokens: int | None) -> tuple[int, int]:
    """How many tokens of a prompt and to decode; what is not asked for gets smaller where the context is short.

    Raises ``UserError`` where what is asked for does not fit.
    """
    if context < 2:
        raise UserError(f"expected a context of at least 2 tokens, found {context}; take another model")
    asked = (prompt or 0) + (tokens or 0)
    if asked + (prompt is None) + (tokens is None) > context:
        raise UserError(f"expected --prompt and --tokens within the context of {context}, found {asked}; ask for fewer")
    decoded = min(TOKENS, context - (prompt or context - context // 2)) if tokens is None else tokens
    return min(PROMPT, context - decoded) if prompt is None else prompt, decoded


def measure(engine: Engine, prompt: int = PROMPT, tokens: int = TOKENS, rounds: int = 5) -> Speed:
    """Prefill of ``prompt`` tokens and decoding of ``tokens`` after it, ``rounds`` times, after one to warm up.

    Raises ``UserError`` where they do not fit into the context.
    """
    engine.take_bytes_per_token()
    (times,) = time_in_turn([engine], prompt, tokens, rounds)
    prefill, decode = zip(*times, strict=True)
    per_token, read = statistics.median(decode), engine.take_bytes_per_token()
    return Speed(
        prefill_tokens_per_s=prompt / statistics.median(prefill),
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


def time_in_turn(
    engines: Sequence[Engine],
    prompt: int,
    tokens: int,
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[float, float]]]:
    """Per engine and round: seconds of a prompt of ``prompt`` tokens, and per token of ``tokens`` decoded after it.

    The engines take turns within a round, so that what else the machine does falls on all of them alike. A first round
    that warms up is left out. Raises ``UserError`` where prompt and tokens do not fit into a context.
    """
    if min(prompt, tokens, rounds) < 1:
        raise UserError("expected at least one prompt token, one token to decode and one round, found fewer")
    for engine in engines:
        if prompt + tokens > engine.context:
            raise UserError(
                f"expected prompt and tokens within the context of {engine.context}, found {prompt + tokens}"
            )
    times: list[list[tuple[float, float]]] = [[] for _ in engines]
    for number in range(rounds + 1):
        for index, (engine, own) in enumerate(zip(engines, times, strict=True)):
            if progress is not None:
                progress(number * len(engines) + index, (rounds + 1) * len(engines))
            found = _time_once(engine, prompt, tokens)
            if number:
                own.append(found)
    return times


def _time_once(engine: Engine, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and per decoded token."""
    ids = [i * 7919 % engine.vocabulary for i in range(prompt)]
    begun = time.perf_counter()
    logits = engine.forward(ids, 0, 0, [prompt - 1])
    first = time.perf_counter()
    for position in range(prompt, prompt + tokens):
        logits = engine.forward([int(logits[0].argmax())], 0, position)
    return first - begun, (time.perf_counter() - first) / tokens
