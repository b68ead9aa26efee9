"""What the routes share: the server's parts from a request, JSON, ids, the line in the log."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from json.encoder import encode_basestring_ascii
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

import tulle
from tulle.errors import UserError
from tulle.serve.errors import body_of
from tulle.serve.generation import Run, watched
from tulle.serve.registry import Registry
from tulle.serve.schemas.common import ErrorResponse
from tulle.serve.security import BoundedRoute
from tulle.serve.served import ServedModel
from tulle.serve.streaming import EventStream

ERRORS = {
    400: "A request that is wrong", 401: "No valid key", 403: "A Host that is not served", 404: "No such model",
    413: "A body that is too large", 500: "A fault of the server", 503: "Too many requests, or the server stops",
    504: "No token within the timeout",
}  # fmt: skip
quote: Callable[[str], str] = encode_basestring_ascii
"""A string as JSON, in ASCII: lines of an event stream must not be cut by characters that some clients take for one."""


def router(error: type[BaseModel] = ErrorResponse) -> APIRouter:
    """A router whose bodies are bounded; ``error``: the shape of its errors."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": what} for status, what in ERRORS.items()
    }
    return APIRouter(route_class=BoundedRoute, responses=responses)


def registry_of(http: Request) -> Registry:
    """The server's models."""
    found: Registry = http.app.state.registry
    return found


def new_id(prefix: str) -> str:
    """An id that nobody else has."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def fingerprint() -> str:
    """What answers: this version of tulle."""
    return f"tulle-{tulle.__version__}"


def compact(content: Any) -> str:
    """JSON without spaces, in ASCII."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def answer(content: Any) -> Response:
    """A JSON answer."""
    return Response(compact(content), media_type="application/json")


def sse(content: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {compact(content)}\n\n"


async def with_errors(path: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """The pieces of a stream; an error in the midst of it is its last event."""
    try:
        async for piece in pieces:
            yield piece
    except (HTTPException, UserError) as error:
        status = getattr(error, "status_code", 400)
        message = str(getattr(error, "detail", error))
        content = body_of(path, status, message, getattr(error, "param", None), getattr(error, "code", None))
        yield sse(content, "error" if content.get("type") == "error" else None)


async def respond(
    http: Request,
    name: str,
    streams: bool,
    begin: Callable[[ServedModel], Awaitable[Run]],
    pieces: Callable[[Run, ServedModel], AsyncIterator[str]],
    whole: Callable[[Run, ServedModel], Awaitable[Any]],
) -> Response:
    """The answer of a model called ``name``: a stream of ``pieces``, or JSON of the ``whole``.

    The model is in use until the answer ends, and the run is cancelled when its client goes away.
    """
    registry = registry_of(http)
    model = await registry.take(name)
    handed_on = False
    try:
        note(http, model)
        run = await begin(model)
        if not streams:
            async with watched(http, run.job):
                content = await whole(run, model)
            note(http, model, run)
            return answer(content)

        def finished() -> None:
            registry.give_back(model)
            note(http, model, run)

        handed_on = True
        return EventStream(with_errors(http.url.path, pieces(run, model)), run.job, finished)
    finally:
        if not handed_on:
            registry.give_back(model)


def note(http: Request, model: ServedModel, run: Run | None = None, **more: Any) -> None:
    """Adds to the request's line in the log."""
    details = http.scope["tulle.log"]
    details["model"] = model.name
    if run is not None:
        job = run.job
        details |= {"prompt": run.prompt_tokens, "cached": run.cached_tokens, "generated": run.generated}
        if job.first_token is not None:
            details["first"] = f"{job.first_token - job.created:.3f}s"
        if job.cancelled:
            details["cancelled"] = job.cancelled
    details |= more


def log_texts(http: Request, **texts: Any) -> None:
    """Prompts and answers, where the server was asked to log them."""
    if http.app.state.settings.log_prompts:
        http.scope["tulle.log"] |= {name: compact(text) for name, text in texts.items()}
