"""One line in the log and one count for every request; no word of prompts unless asked."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tulle.serve.metrics import Metrics

logger = logging.getLogger("tulle.serve")
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Asked for all the time: logged only where they fail."""


class AccessLog:
    """Middleware. Routes put what else belongs to the line into ``scope["tulle.log"]``."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        identity = secrets.token_hex(8)
        details: dict[str, Any] = {}
        scope["tulle.log"], scope["tulle.id"] = details, identity
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", identity.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - begun
            # The route's pattern, so that a client's paths make no new labels.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            if scope["path"] not in QUIET or status >= 500:
                more = "".join(f" {name}={value}" for name, value in details.items())
                path = scope["path"][:200].encode("unicode_escape").decode()
                logger.info("%s %s %s %d %.3fs%s", identity, scope["method"], path, status, seconds, more)
