"""Clients of an OpenAI-compatible server, light enough to share the machine with it.

Each client is one connection that sends ``/v1/completions`` requests with token ids, streamed, one after the other. The
answers are not parsed more than timing needs: a chunk with text or a token is a moment. A piece of a character has no
chunk of its own, so that the number of tokens is taken from the answer's ``usage``.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

USAGE = re.compile(rb'"completion_tokens": ?([0-9]+)')


@dataclass
class Answer:
    """One streamed request, in seconds since it was sent."""

    prompt_tokens: int
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between one token and the next."""
    chunks: int = 0
    tokens: int = 0
    """That the server says it generated."""
    total: float = 0.0


async def ask(host: str, port: int, body: dict[str, Any], api_key: str | None = None) -> Answer:
    """Sends one request and reads its stream to the end. Raises ``RuntimeError`` for a status that is not 200."""
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{key}"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    begun = time.perf_counter()
    writer.write(head.encode() + content)
    await writer.drain()
    answer = Answer(len(body["prompt"]))
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"expected status 200, found {status!r}: {(await reader.read(2000))!r}")
    last, rest = 0.0, b""
    while data := await reader.read(1 << 16):
        now = time.perf_counter() - begun
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if found := USAGE.search(line):
                answer.tokens = int(found[1])
            if not line.startswith(b"data: {") or b'"choices":[]' in line or b'"choices": []' in line:
                continue
            if b'"finish_reason":"' in line and b'"text":""' in line:
                continue  # the chunk that only says why it ended
            answer.chunks += 1
            if answer.chunks == 1:
                answer.first = now
            else:
                answer.gaps.append(now - last)
            last = now
    answer.total = time.perf_counter() - begun
    writer.close()
    return answer


async def load(
    port: int, clients: int, prompts: Sequence[Sequence[int]], tokens: int, model: str, extra: dict[str, Any]
) -> tuple[list[Answer], float]:
    """All prompts, by so many clients at once; answers, and the seconds from the first request to the last answer."""
    waiting = list(prompts)[::-1]
    answers: list[Answer] = []

    async def client() -> None:
        while waiting:
            prompt = waiting.pop()
            body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0} | extra
            answers.append(await ask("127.0.0.1", port, body))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, time.perf_counter() - begun


def random_prompts(count: int, least: int, most: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids that no special token is among (those below 100 are left out)."""
    generator = random.Random(seed)
    return [[generator.randrange(100, vocabulary) for _ in range(generator.randint(least, most))] for _ in range(count)]


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Generated tokens a second over all clients; percentiles of the time to the first token and between tokens, in
    seconds."""
    first = [answer.first for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / seconds,
        "first_p50": statistics.median(first),
        "first_p95": percentile(first, 0.95),
        "gap_p50": statistics.median(gaps),
        "gap_p95": percentile(gaps, 0.95),
        "tokens": sum(answer.tokens for answer in answers),
        "seconds": seconds,
    }


def percentile(numbers: Sequence[float], share: float) -> float:
    """By the nearest rank."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
