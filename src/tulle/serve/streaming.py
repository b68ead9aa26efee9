"""Server-sent events: one write per step and stream, comments while nothing comes, an end for readers that stall."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tulle.serve.worker import Job

KEEP_ALIVE = 10.0
"""Seconds without a byte after which a comment is sent."""
STALLED = 60.0
"""Seconds after which a client that takes no byte is given up."""
COMMENT = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


class EventStream(Response):
    """What a generator gives, as an event stream. The job is cancelled when the client goes away or stalls.

    The generator ends by itself when the job's events do; a piece is sent in one write.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[str], job: Job, finished: Callable[[], Awaitable[None] | None]):
        super().__init__(b"", 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, self.media_type)
        # Of unknown length.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._pieces, self._job, self._finished = pieces, job, finished
        self._sent = time.monotonic()
        self._sending = False
        self._ticker: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._job.on_cancel = task.cancel
        watcher = asyncio.create_task(cancel_when_gone(receive, self._job))
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(KEEP_ALIVE, self._tick, loop)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._pieces:
                if piece:
                    await self._write(send, piece.encode(), True)
            await self._write(send, b"", False)
        except asyncio.CancelledError:
            # A reader that stalls: uvicorn closes a connection whose answer was not completed.
            if self._job.cancelled != "slow":
                raise
        finally:
            self._ticker.cancel()
            watcher.cancel()
            self._job.on_cancel = None
            self._job.cancel()
            done = self._finished()
            if done is not None:
                await done

    async def _write(self, send: Send, body: bytes, more: bool) -> None:
        self._sending = True
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = False
        self._sent = time.monotonic()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        quiet = time.monotonic() - self._sent
        if self._sending and quiet > STALLED:
            self._job.cancel("slow")
            return
        if not self._sending and quiet >= KEEP_ALIVE:
            self._job.nudge()
        self._ticker = loop.call_later(KEEP_ALIVE, self._tick, loop)


async def cancel_when_gone(receive: Receive, job: Job) -> None:
    """Cancels a job once its client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()
