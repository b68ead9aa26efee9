"""The application: routes, errors, middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

import tulle
from tulle.engine import QueueFull
from tulle.errors import UserError
from tulle.serve.access import AccessLog
from tulle.serve.errors import ApiError, busy, of_validation, response_of
from tulle.serve.registry import Registry
from tulle.serve.routes import (
    chat,
    completions,
    embeddings,
    health,
    messages,
    models,
    responses,
    score,
    tokens,
)
from tulle.serve.security import Gate, Keys, read_keys
from tulle.serve.static import page_routes

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def create_app(registry: Registry) -> FastAPI:
    """The application of some models; its first one is loaded when it starts.

    Its interactive documentation is switched off: those pages load scripts from elsewhere. ``/openapi.json`` is there.
    """
    settings = registry.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await registry.load_first()
        yield
        await registry.close()

    app = FastAPI(title="Tulle", version=tulle.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.registry, app.state.settings = registry, settings
    for part in (chat, completions, responses, embeddings, messages, models, tokens, score, health):
        app.include_router(part.routes)
    app.router.routes.extend(page_routes())
    _add_errors(app)
    _describe(app)
    hosts = None if settings.host not in LOOPBACK or "*" in settings.allow_host else frozenset(settings.allow_host)
    keys = Keys(read_keys(settings.api_key, settings.api_key_file))
    # The last one added is met first.
    app.add_middleware(Gate, keys=keys, max_body=settings.max_body, hosts=hosts)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog, metrics=registry.metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return response_of(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return response_of(request.url.path, of_validation(error.errors()))

    @app.exception_handler(UserError)
    async def user(request: Request, error: UserError) -> Response:
        found = busy(str(error)) if isinstance(error, QueueFull) else ApiError(400, str(error))
        return response_of(request.url.path, found)

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> Response:
        # uvicorn logs the traceback.
        return response_of(
            request.url.path, ApiError(500, f"expected an answer, found a fault: {type(error).__name__}")
        )


def _describe(app: FastAPI) -> None:
    """What is wrong in a body is answered with 400, not with FastAPI's 422."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        return found

    app.openapi = openapi  # type: ignore[method-assign]
