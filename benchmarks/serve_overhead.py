"""What the server itself costs per streamed token: HTTP, JSON and threads, without a model.

    python benchmarks/serve_overhead.py --streams 16 --tokens 400 --rate 60

The engine's place is taken by one that gives every stream a token ``rate`` times a second. The server is a process
of its own; what is counted is its CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tulle
from tulle.engine.kv_cache import KVCache
from tulle.engine.request import Event, Request
from tulle.engine.request import Sequence as Running
from tulle.engine.scheduler import Stats
from tulle.text.tokenizer_folder import read_tokenizer

HOST = "127.0.0.1"
STALL = 30.0
WORDS = [" the", " quick", " brown", " fox", " jumps", " over", " a", " lazy", " dog", "."]


class PacedScheduler:
    """One token for every sequence, ``rate`` times a second."""

    def __init__(self, rate: float):
        self.stats, self.cache = Stats(), KVCache(1024)
        self._pause, self._running, self._next = 1 / rate, [], 0.0

    @property
    def idle(self) -> bool:
        return not self._running

    waiting = 0

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> Running:
        self._running.append(Running(request, 0))
        return self._running[-1]

    def cancel(self, sequence: Running) -> None:
        if sequence in self._running:
            self._running.remove(sequence)

    def step(self) -> list[Event]:
        self._next = max(self._next + self._pause, time.monotonic())
        time.sleep(max(self._next - time.monotonic(), 0))
        events = []
        for sequence in list(self._running):
            sequence.tokens.append(1)
            number = len(sequence.tokens)
            ended = number == sequence.request.max_tokens
            if ended:
                self._running.remove(sequence)
            finish: Any = "length" if ended else None
            events.append(Event(sequence, 1, WORDS[number % len(WORDS)], None, finish))
        return events


def serve(port: int, rate: float) -> None:
    """The server's process; its CPU time between two calls of ``/cpu`` is what counts."""
    from fastapi import FastAPI
    from starlette.responses import JSONResponse

    from tulle.serve import server
    from tulle.serve.settings import Settings

    folder = Path(tulle.__file__).parent / "reference"

    def opened(*_: Any) -> Any:
        text = read_tokenizer(folder)
        text.templates = {"default": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}
        vocabulary = text.tokenizer.get_vocab_size()
        return SimpleNamespace(
            text=text, scheduler=PacedScheduler(rate), context=4096, hidden=8, vocabulary=vocabulary, config={}
        )

    create_app = server.create_app

    def with_cpu(registry: Any) -> FastAPI:
        app = create_app(registry)

        @app.get("/cpu")
        async def cpu() -> JSONResponse:
            used = resource.getrusage(resource.RUSAGE_SELF)
            return JSONResponse(used.ru_utime + used.ru_stime)

        return app

    server.create_app = with_cpu
    registry = server.Registry
    server.Registry = lambda settings: registry(settings, opened)  # type: ignore[misc, assignment]
    server.serve(Settings(models=[str(folder)], port=port, sequences=64))


async def read_stream(port: int, path: str, tokens: int) -> None:
    """One client: reads and throws away. Fails where nothing comes for ``STALL`` seconds."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": tokens}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(content), content)
    )
    size = 0
    while part := await asyncio.wait_for(reader.read(1 << 16), STALL):
        size += len(part)
    writer.close()
    assert size > 50 * tokens, size


async def read_streams(port: int, path: str, tokens: int, streams: int) -> None:
    await asyncio.gather(*(read_stream(port, path, tokens) for _ in range(streams)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float, default=60.0)
    parser.add_argument("--path", default="/v1/chat/completions")
    options = parser.parse_args()
    with socket.create_server((HOST, 0)) as found:
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(port, options.rate), daemon=True)
    server.start()
    import httpx

    def cpu() -> float:
        return float(httpx.get(f"http://{HOST}:{port}/cpu").json())

    until = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"http://{HOST}:{port}/health")
            break
        except httpx.HTTPError:
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.1)
    asyncio.run(read_streams(port, options.path, 5, 1))
    before, begun = cpu(), time.monotonic()
    asyncio.run(read_streams(port, options.path, options.tokens, options.streams))
    seconds, used = time.monotonic() - begun, cpu() - before
    each = used / (options.streams * options.tokens)
    share = each * options.streams * options.rate
    print(
        f"{options.streams} streams of {options.tokens} tokens in {seconds:.1f} s: {1e6 * each:.0f} µs per token, "
        f"{100 * share:.1f} % of a core at {options.rate:.0f} tokens/s each"
    )
    server.terminate()
    server.join()


if __name__ == "__main__":
    main()
