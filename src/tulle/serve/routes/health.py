"""``/health``, ``/ready`` and ``/metrics``: for whoever watches the server."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from tulle.serve.errors import busy
from tulle.serve.routes.common import answer, registry_of, router

routes = router()


@routes.get("/health", tags=["Operation"])
async def health() -> Response:
    """The process answers."""
    return answer({"status": "ok"})


@routes.get("/ready", tags=["Operation"])
async def ready(http: Request) -> Response:
    """New requests are welcome; 503 once the server drains."""
    registry = registry_of(http)
    if registry.draining:
        raise busy("expected a running server, found one that stops; try another one")
    return answer({"status": "ready", "models": [served.name for served in registry.loaded()]})


@routes.get("/metrics", tags=["Operation"])
async def metrics(http: Request) -> Response:
    """In Prometheus' text format."""
    return Response(registry_of(http).metrics.text(), media_type="text/plain; version=0.0.4")
