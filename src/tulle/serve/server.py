"""Runs an application: binds, serves, drains."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import importlib.util
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from tulle.errors import UserError
from tulle.serve.app import create_app
from tulle.serve.registry import Registry
from tulle.serve.settings import Settings

BACKLOG = 512
SWITCH_INTERVAL = 0.001
"""Seconds after which Python's threads take turns: the engine's never waits long for the event loop's."""
LAST_WORDS = 5.0
"""Seconds that connections get to close when the server stops."""
logger = logging.getLogger("tulle.serve")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens: two servers cannot have one address, and clients wait while the model loads.

    Raises ``UserError`` where the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family[0], socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(family[4])
        found.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        what = "a free port" if getattr(error, "errno", None) == errno.EADDRINUSE else "an address of this machine"
        raise UserError(f"expected {what} to listen at, found {host}:{port} ({error}); try another --port") from None
    return found


class Server(uvicorn.Server):
    """Drains on the first signal: no new work, running answers end, then it stops. A second one stops at once."""

    def __init__(self, config: uvicorn.Config, registry: Registry):
        super().__init__(config)
        self._registry = registry
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._registry.draining:
            logger.info("stopping at once")
            self._cancel_all()
            self.should_exit = self.force_exit = True
            return
        self._registry.draining = True
        logger.info("draining: no new requests; a second signal stops at once")
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        until = asyncio.get_running_loop().time() + self._registry.settings.drain_timeout
        while any(entry.users for entry in self._registry.entries.values()):
            if asyncio.get_running_loop().time() >= until:
                self._cancel_all()
                break
            await asyncio.sleep(0.02)
        self.should_exit = True

    def _cancel_all(self) -> None:
        for served in self._registry.loaded():
            for job in list(served.worker.jobs):
                job.cancel("drain")


def serve(settings: Settings, started: Callable[[str, Registry], None] | None = None) -> None:
    """Serves until a signal comes. ``started`` is told the address once it answers. Raises ``UserError`` for an address
    or a model that cannot be had."""
    found = bind(settings.host, settings.port)
    with contextlib.closing(found):
        registry = Registry(settings)
        app = create_app(registry)
        registry.open_first()
        sys.setswitchinterval(SWITCH_INTERVAL)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        config = uvicorn.Config(
            app,
            loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
            http="httptools" if importlib.util.find_spec("httptools") else "h11",
            ws="none",
            lifespan="on",
            backlog=BACKLOG,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,  # type: ignore[arg-type]  # a number of seconds all the same
        )
        server = Server(config, registry)
        host, port = found.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        async def main() -> None:
            task = asyncio.ensure_future(server.serve([found]))
            while not server.started and not task.done():
                await asyncio.sleep(0.01)
            # What is there now stays: the garbage collector need not look at it while streams wait.
            gc.collect()
            gc.freeze()
            if server.started and started is not None:
                started(address, registry)
            await task

        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(main())
