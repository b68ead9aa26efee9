"""What a request must pass before its content is looked at: keys, hosts, sizes, depths."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import ASGIApp, Receive, Scope, Send

from tulle.errors import UserError
from tulle.serve.errors import ApiError, response_of

DEPTH = 64
"""Lists and objects of JSON inside each other."""
IN_THREAD = 1 << 17
"""Bytes of a body from which on it is parsed in a thread, so that running streams go on."""
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Answered without a key; so are the files of the page."""
PAGE = "/page/"
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Possessive: linear time whatever the bytes are, an end that is missing included."""


def read_keys(keys: Iterable[str], file: Path | None) -> list[str]:
    """All API keys; a file has one per line, ``#`` begins a comment. Raises ``UserError`` for a file without any."""
    found = list(keys)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"expected a file of API keys, one per line, found {file} ({error})") from None
        in_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not in_file:
            raise UserError(f"expected at least one API key in {file}, found none; leave the option out for none")
        found += in_file
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in found):
        raise UserError("expected API keys of printable ASCII without spaces, found another one")
    return found


class Keys:
    """API keys, compared in constant time: every key is compared, whichever one matches."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, given: bytes) -> bool:
        digest, found = _digest(given), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """Middleware: hosts, keys and the size of bodies, before anything of a body is read.

    ``hosts``: names under which the server may be called besides addresses and ``localhost``; None: any. It keeps web
    pages from reaching a server on loopback through a name of theirs that points there (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int, hosts: frozenset[str] | None):
        self._app, self._keys, self._max_body, self._hosts = app, keys, max_body, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await response_of(scope["path"], error)(scope, receive, send)
            return
        scope["tulle.max_body"] = self._max_body
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])  # lower case; of repeated ones the last
        if self._hosts is not None and not _known_host(headers.get(b"host", b""), self._hosts):
            raise ApiError(403, "expected a Host that is an address or localhost; --allow-host NAME allows another")
        path = scope["path"]
        if self._keys and scope["method"] != "OPTIONS" and path not in OPEN_PATHS and not path.startswith(PAGE):
            given = headers.get(b"x-api-key")
            bearer = headers.get(b"authorization", b"")
            if given is None and bearer[:7].lower() == b"bearer ":
                given = bearer[7:].strip()
            if given is None:
                raise ApiError(
                    401,
                    "expected an API key, found none; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if not self._keys.accepts(given):
                raise ApiError(
                    401,
                    "expected a valid API key, found another one",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._max_body:
            raise too_large(self._max_body)


def too_large(most: int) -> ApiError:
    """413; the connection is closed, since the rest of the body is not read."""
    return ApiError(
        413,
        f"expected a body of at most {most} bytes, found more; --max-body allows more",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _known_host(header: bytes, names: frozenset[str]) -> bool:
    host = header.decode("latin-1").lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if host == "localhost" or host.endswith(".localhost") or host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_json(body: bytes) -> Any:
    """The JSON of a body. Raises ``ApiError`` (400) for what is no JSON, NaN, halves of characters, or too deep."""
    outside = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    steps = np.zeros(256, np.int8)
    steps[list(b"[{")], steps[list(b"]}")] = 1, -1
    if len(outside) and int(steps[outside].cumsum(dtype=np.int32).max()) > DEPTH:
        raise ApiError(400, f"expected JSON of at most {DEPTH} levels, found more", code="invalid_json")
    collects = gc.isenabled()
    # What is parsed is no garbage; looking for some among many new objects takes most of the time.
    gc.disable()
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"expected JSON in UTF-8, found: {error}", code="invalid_json") from None
    finally:
        if collects:
            gc.enable()


class BoundedRequest(Request):
    """A request whose body is read up to a bound and whose JSON is bounded in depth."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            most = self.scope["tulle.max_body"]
            parts, size = [], 0
            async for part in self.stream():
                size += len(part)
                if size > most:
                    raise too_large(most)
                parts.append(part)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        body = await self.body()
        return await asyncio.to_thread(parse_json, body) if len(body) >= IN_THREAD else parse_json(body)


class BoundedRoute(APIRoute):
    """Hands its function a :class:`BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return bounded
