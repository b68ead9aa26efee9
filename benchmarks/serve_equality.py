"""The same texts under load as one at a time, from a running ``tulle serve``.

    python benchmarks/serve_equality.py --model FOLDER [--requests 200] [--load 16] [--option=--cache=f32]

Makes requests of every kind, with prompts of 1 to 2000 tokens: streamed or not, greedy or sampled by a seed, with stop
strings, with a regular expression or a JSON schema. Sends each alone, to a server that was just started; then all of
them to a second one, so many at a time, in another order, with as many more whose clients go away in the middle.
Compares texts and reasons for ending. Then counts pages: none may be in use.

Prints differences; exit code 1 where there are any. Writes results/serve_equality.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from serving import started
from tulle import machine

RESULTS = Path(__file__).parent / "results" / "serve_equality.json"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
WORDS = "the a small old red quick tree river house bird walked sang slept over under into was and but then".split()


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of /v1/completions."""
    generator = random.Random(seed)
    shared = " ".join(generator.choice(WORDS) for _ in range(400))
    found = []
    for number in range(count):
        length = generator.choice([1, 3, 20, 60, 200, 700, 1800]) if number else 1800
        words = " ".join(generator.choice(WORDS) for _ in range(length))
        body: dict[str, Any] = {
            "model": "default",
            "prompt": f"{shared} {words}" if length <= 200 and generator.random() < 0.4 else words,
            "max_tokens": generator.choice([1, 8, 30, 60]),
            "stream": generator.random() < 0.5,
            "temperature": 0 if generator.random() < 0.5 else 0.9,
            "top_p": 0.95,
            "seed": number,
        }
        kind = generator.random()
        if kind < 0.2:
            body["stop"] = generator.sample([" the", ".", "\n", "an", "er "], 2)
        elif kind < 0.3:
            body |= {"regex": "(yes|no|perhaps), [a-z]{3,12}", "max_tokens": 30}
        elif kind < 0.4:
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
            body["max_tokens"] = 60
        elif kind < 0.5:
            body["repetition_penalty"] = 1.2
        found.append(body)
    return found


async def ask(client: httpx.AsyncClient, body: dict[str, Any], stop_after: int | None = None) -> tuple[str, str]:
    """Text and reason; with ``stop_after``, the client goes away after so many chunks."""
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    text, reason, chunks = "", "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            chunks += 1
            if stop_after is not None and chunks >= stop_after:
                break
    return text, reason


async def all_of(
    port: int, bodies: list[dict[str, Any]], order: list[int], load: int, leaving: int
) -> list[tuple[str, str]]:
    """Answers in the order of the bodies; ``leaving`` more requests are broken off."""
    generator = random.Random(5)
    found: list[tuple[str, str]] = [("", "")] * len(bodies)
    waiting: list[tuple[int, int | None]] = [(number, None) for number in order]
    for _ in range(leaving):
        number = generator.randrange(len(bodies))
        waiting.insert(generator.randrange(len(waiting)), (number, generator.randint(1, 5)))
    waiting.reverse()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=900) as client:

        async def one() -> None:
            while waiting:
                number, stop_after = waiting.pop()
                if stop_after is None:
                    found[number] = await ask(client, bodies[number])
                else:
                    await ask(client, bodies[number] | {"stream": True}, stop_after)

        await asyncio.gather(*(one() for _ in range(load)))
    return found


def used_pages(port: int) -> int:
    time.sleep(1)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(r"^tulle_cache_pages_used\{.*\} ([0-9.]+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--load", type=int, default=16)
    parser.add_argument("--option", action="append", default=[])
    options = parser.parse_args()
    bodies = requests(options.requests, 1)
    order = list(range(len(bodies)))
    settings = ["--sequences", "16", "--context", "3072", "--served-name", "default", *options.option]
    with started(options.model, settings) as port:
        begun = time.perf_counter()
        alone = asyncio.run(all_of(port, bodies, order, 1, 0))
        alone_seconds = time.perf_counter() - begun
        leaked = used_pages(port)
    random.Random(3).shuffle(order)
    with started(options.model, settings) as port:
        begun = time.perf_counter()
        together = asyncio.run(all_of(port, bodies, order, options.load, len(bodies)))
        seconds = time.perf_counter() - begun
        leaked += used_pages(port)
    different = [number for number in range(len(bodies)) if alone[number] != together[number]]
    for number in different[:10]:
        print(json.dumps(bodies[number])[:300], alone[number], together[number], sep="\n  ")
    result = {
        "model": Path(options.model).name,
        "options": options.option,
        "requests": len(bodies),
        "load": options.load,
        "different": len(different),
        "pages_in_use_afterwards": leaked,
        "seconds_alone": alone_seconds,
        "seconds_together": seconds,
        "machine": machine.describe(),
    }
    print(json.dumps(result))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if different or leaked else 0


if __name__ == "__main__":
    sys.exit(main())
