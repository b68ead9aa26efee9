"""Errors as HTTP: one class, in OpenAI's shape, or in Anthropic's under ``/v1/messages``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tulle.errors import UserError

ANTHROPIC = "/v1/messages"
"""Where errors have Anthropic's shape."""
RETRY_AFTER = 2
"""Seconds after which a client may try again."""
_OPENAI = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(HTTPException):
    """Something that the client is told: ``status``, one line, the field that it is about, a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, str(UserError(message)), dict(headers or {}))
        self.param, self.code = param, code


def busy(message: str) -> ApiError:
    """503 with ``Retry-After``."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": str(RETRY_AFTER)})


def unsupported(name: str, message: str) -> ApiError:
    """400 for a field that would change the answer and is not supported."""
    return ApiError(400, message, param=name, code="unsupported_parameter")


def body_of(path: str, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error, in the shape of the API that ``path`` belongs to."""
    if path.startswith(ANTHROPIC):
        kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = _OPENAI.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_of(path: str, error: HTTPException) -> JSONResponse:
    """The answer for an error; ``path`` is the request's."""
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    content = body_of(path, error.status_code, str(error.detail), param, code)
    return JSONResponse(content, error.status_code, headers=dict(error.headers or {}))


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for one of pydantic's errors, which names the field and not its value."""
    # Of a field with several types, the error that was written for people comes first, then that of the type that fits
    # best: the deepest one.
    best = max(errors, key=lambda error: (error["type"] == "value_error", len(error["loc"])), default=None)
    if best is None:
        return ApiError(400, "expected another body")
    place = [str(part) for part in best["loc"] if part not in ("body", "query", "path") and not _is_type(part)]
    param = ".".join(place) or None
    message = str(best["msg"]).removeprefix("Value error, ")
    if message.startswith("expected"):
        return ApiError(400, message, param=param)
    return ApiError(400, f"expected another value of {param or 'the body'}: {message}", param=param)


def _is_type(part: object) -> bool:
    """A place in a union is the name of a type."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or not part.replace("_", "a").isalnum())
