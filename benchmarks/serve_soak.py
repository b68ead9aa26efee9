"""``tulle serve`` under load for half an hour: errors, memory, pages, and the same answer at the end.

    python benchmarks/serve_soak.py --model FOLDER [--minutes 30] [--load 16]

So many clients send requests of every kind (see serve_equality.py). Some go away in the middle of a stream, some read
slowly, some send what is no request. Every 10 seconds the server's resident memory is noted. A canary, a greedy request
with a fixed prompt, is asked before and after.

Right is: no answer of 500 or more and no broken stream; memory at the end within 2 % of that after the first fifth;
no page in use at the end; the same canary. Prints what was found; exit code 1 where something is not right. Writes
results/serve_soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve_equality import ask, requests, used_pages
from serving import free_port, start
from tulle import machine

RESULTS = Path(__file__).parent / "results" / "serve_soak.json"
CANARY = {
    "model": "default", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "stream": False,
}  # fmt: skip
WRONG = (
    b"{",
    b'{"model": "default"}',
    b'{"model": "default", "prompt": "x", "max_tokens": -5}',
    b'{"model": "default", "prompt": "x", "temperature": NaN}',
    b'{"model": "other", "prompt": "x"}',
    b'{"model": "default", "prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"model": "default", "prompt": "x", "regex": "(a*)*(b"}',
    b'{"model": "default", "prompt": "x", "stop": ' + json.dumps(["x"] * 10_000).encode() + b"}",
    b"\xff\xfe\x00",
)


async def soak(port: int, process: psutil.Process, seconds: float, load: int) -> tuple[Counter[str], list[float]]:
    counts: Counter[str] = Counter()
    memory: list[float] = []
    bodies = requests(400, 11)
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            generator = random.Random(number)
            while time.monotonic() < end:
                body, kind = generator.choice(bodies), generator.random()
                try:
                    if kind < 0.1:
                        answer = await client.post("/v1/completions", content=generator.choice(WRONG))
                        counts[f"malformed: {answer.status_code // 100}xx"] += 1
                    elif kind < 0.3:
                        await ask(client, body | {"stream": True}, generator.randint(1, 8))
                        counts["went away"] += 1
                    elif kind < 0.35:
                        await slow(client, body | {"stream": True}, generator.random() * 0.3)
                        counts["read slowly"] += 1
                    else:
                        text, reason = await ask(client, body)
                        counts[f"answered: {reason}"] += 1
                except (httpx.HTTPError, RuntimeError) as error:
                    counts[f"failed: {type(error).__name__} {str(error)[:80]}"] += 1

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(process.memory_info().rss / 1e6)
                await asyncio.sleep(10)

        await asyncio.gather(watch(), *(one(number) for number in range(load)))
    return counts, memory


async def slow(client: httpx.AsyncClient, body: dict[str, Any], pause: float) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_raw():
            await asyncio.sleep(pause)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--load", type=int, default=16)
    parser.add_argument("--option", action="append", default=[])
    options = parser.parse_args()
    port = free_port()
    settings = ["--sequences", "16", "--context", "3072", "--served-name", "default", *options.option]
    server = start(options.model, settings, port)
    try:
        process = psutil.Process(server.pid)
        url = f"http://127.0.0.1:{port}/v1/completions"
        canary = httpx.post(url, json=CANARY, timeout=60).json()["choices"][0]["text"]
        counts, memory = asyncio.run(soak(port, process, 60 * options.minutes, options.load))
        leaked = used_pages(port)
        again = httpx.post(url, json=CANARY, timeout=60).json()["choices"][0]["text"]
        files = len(process.open_files()) + len(process.net_connections())
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    settled = memory[len(memory) // 5]
    growth = memory[-1] / settled - 1
    bad = {k: n for k, n in counts.items() if k.startswith("failed") or (k.startswith("malf") and "4xx" not in k)}
    result = {
        "model": Path(options.model).name,
        "minutes": options.minutes,
        "load": options.load,
        "counts": dict(sorted(counts.items())),
        "memory_mb": [round(value, 1) for value in memory],
        "growth_after_the_first_fifth": growth,
        "pages_in_use_afterwards": leaked,
        "open_files_afterwards": files,
        "same_canary": canary == again,
        "exit_code": code,
        "machine": machine.describe(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "memory_mb"}, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if bad or leaked or canary != again or abs(growth) > 0.02 or code else 0


if __name__ == "__main__":
    sys.exit(main())
