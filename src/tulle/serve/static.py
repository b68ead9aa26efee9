"""The chat page at ``/``: a handful of static files, sent with the right types, caching and security headers.

The files lie in ``serve/page``. They are read once, so a request never names a path on the disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""By the end of a file's name; nothing else is sent. The system's own table of types may be wrong or absent."""

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Text can never become markup: the browser refuses innerHTML and its relatives.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""Content-Security-Policy: the page talks to its own server and to nobody else."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, but asked for again each time, which costs a 304: an upgraded server never meets an old script.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """200 with the content, or 304 where the client holds it already."""
        headers = {**HEADERS, "ETag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def page_files() -> dict[str, PageFile]:
    """The page's files by name."""
    found = {}
    for file in files("tulle.serve").joinpath("page").iterdir():
        media_type = TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            found[file.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


def page_routes() -> list[Route]:
    """Routes of the page: ``/``, and ``/page/{file}`` for what it loads. They need no API key.

    Every address that the page uses is relative, so it also works below a path of a reverse proxy.
    """
    held = page_files()
    index = held.pop("index.html")

    async def root(request: Request) -> Response:
        return index.response(request)

    async def file(request: Request) -> Response:
        found = held.get(request.path_params["file"])
        return Response("no such file\n", 404, HEADERS) if found is None else found.response(request)

    return [
        Route("/", root, name="page", include_in_schema=False),
        Route("/page/{file}", file, name="page_file", include_in_schema=False),
    ]
