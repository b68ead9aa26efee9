"""From a request's fields to the engine's requests, and from a job's events to the pieces of answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import Request as HttpRequest

from tulle.engine.request import Constraint, Event, Finish, Request
from tulle.engine.sampling import Sampling
from tulle.serve.errors import ApiError
from tulle.serve.schemas.common import Generating
from tulle.serve.served import ServedModel, random_seed
from tulle.serve.streaming import cancel_when_gone
from tulle.serve.worker import Job
from tulle.text.tool_formats import Content, Delta

if TYPE_CHECKING:
    from tulle.engine.grammar import Kind

NEUTRAL_TEMPERATURE = 1.0
SMALLEST_TOP_P = 1e-6
"""What a top_p of 0 means: the most likely token."""
TIMEOUT_HEADER = "x-request-timeout"
DIRECT = (
    "min_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "repeat_last_n",
)
"""Fields whose name and meaning are the engine's."""


class Parsing(Protocol):
    """Text in, deltas out: :class:`tulle.text.tool_formats.Parser`."""

    def push(self, text: str) -> list[Delta]: ...

    def end(self) -> list[Delta]: ...


class PlainText:
    """The parser of an answer that is text and nothing else."""

    def push(self, text: str) -> list[Delta]:
        return [Content(text)]

    def end(self) -> list[Delta]:
        return []


def sampling_of(body: Generating, model: ServedModel) -> Callable[[int], Sampling]:
    """Settings of the i-th answer."""
    values: dict[str, Any] = {"temperature": NEUTRAL_TEMPERATURE, **model.defaults}
    for name in DIRECT:
        if (value := getattr(body, name)) is not None:
            values[name] = value
    if body.temperature is not None:
        values["temperature"] = body.temperature
    if body.top_p is not None:
        values["top_p"] = max(body.top_p, SMALLEST_TOP_P)
    if body.top_k is not None:
        values["top_k"] = max(body.top_k, 0)
    if body.dry_sequence_breakers is not None:
        values["dry_sequence_breakers"] = tuple(body.dry_sequence_breakers)
    if body.logit_bias:
        values["logit_bias"] = _biases(body.logit_bias, model.engine.vocabulary)
    seed = random_seed() if body.seed is None else body.seed
    return lambda number: Sampling(**values, seed=seed + number)


def _biases(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdigit() and int(token) < vocabulary):
            raise ApiError(
                400, f"expected token ids below {vocabulary} in logit_bias, found {token!r}", param="logit_bias"
            )
    return {int(token): bias for token, bias in given.items()}


def deadline_of(timeout: float | None, http: HttpRequest) -> float | None:
    """From the body, a header, or the server's default; in seconds of ``time.monotonic()``."""
    if timeout is None and (header := http.headers.get(TIMEOUT_HEADER)) is not None:
        try:
            timeout = float(header)
        except ValueError:
            timeout = 0.0
        if not 0 < timeout <= 86400:
            raise ApiError(400, f"expected {TIMEOUT_HEADER} in seconds, up to 86400, found another value")
    if timeout is None:
        timeout = http.app.state.settings.timeout
    return None if timeout is None else time.monotonic() + timeout


@dataclass
class Piece:
    """What one event adds to one of a request's answers."""

    number: int
    deltas: Sequence[Delta]
    event: Event


class Run:
    """A job, with a parser for each of its answers."""

    def __init__(self, job: Job, parsers: Sequence[Parsing], prompt_tokens: int, per_prompt: int = 1):
        self.job, self.prompt_tokens = job, prompt_tokens
        self._parsers, self._per_prompt = parsers, per_prompt

    async def steps(self) -> AsyncIterator[list[Piece]]:
        """The pieces of each step until all answers have ended; an empty list where nothing came for long.

        Raises ``ApiError`` where the engine failed or the server stops.
        """
        job = self.job
        while not job.done:
            pieces = []
            for number, event in await job.events():
                if event.finish is not None:
                    self._check_end(event)
                parser = self._parsers[number]
                deltas = parser.push(event.text) if event.text else []
                if event.finish is not None:
                    deltas = [*deltas, *parser.end()]
                pieces.append(Piece(number, deltas, event))
            yield pieces

    async def to_the_end(self) -> None:
        """Waits until all sequences have ended. Raises ``ApiError`` as :meth:`steps` does."""
        async for _ in self.steps():
            pass

    def _check_end(self, event: Event) -> None:
        if event.finish == "error":
            self.job.cancel()
            message = event.sequence.error or "expected an answer, found a fault of the engine"
            # A grammar may turn out to be too large only when it is followed.
            theirs = event.sequence.request.constraint is not None and "grammar" in message
            raise ApiError(400 if theirs else 500, message)
        if event.finish == "cancelled" and self.job.cancelled == "drain":
            raise ApiError(503, "expected a running server, found one that stops; try again", code="stopping")
        if event.finish == "deadline" and event.sequence.first_token is None:
            self.job.cancel()
            raise ApiError(504, "expected a first token within the timeout, found none; allow more", code="timeout")

    @property
    def cached_tokens(self) -> int:
        """Of all prompts, found in the cache."""
        return sum(sequence.cached_tokens for sequence in self.job.sequences[:: self._per_prompt])

    @property
    def generated(self) -> int:
        return sum(len(sequence.tokens) for sequence in self.job.sequences)

    def usage(self) -> dict[str, Any]:
        """Tokens in OpenAI's shape."""
        generated = self.generated
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def requests_of(
    model: ServedModel,
    prompt: Sequence[int],
    body: Generating,
    count: int,
    max_tokens: int | None,
    **more: Any,
) -> list[Request]:
    """The engine's requests of ``count`` answers to one prompt. ``max_tokens`` beyond the context is cut to it."""
    model.check_prompt(prompt, generates=max_tokens != 0)
    room = model.room - len(prompt)
    most = room if max_tokens is None else min(max_tokens, room)
    sampling = sampling_of(body, model)
    return [
        Request(
            prompt,
            most,
            sampling(number),
            stop=body.stops(),
            ignore_end=bool(body.ignore_eos),
            **more,
        )
        for number in range(count)
    ]


async def constraint_of(
    model: ServedModel, body: Generating, format: tuple[Kind, str] | None
) -> Callable[[], Constraint] | None:
    """What the whole answer must follow: one of ``grammar``, ``regex`` and the request's format (kind, text)."""
    given: list[tuple[Kind, str]] = [] if format is None else [format]
    if body.grammar is not None:
        given.append(("gbnf" if "::=" in body.grammar else "lark", body.grammar))
    if body.regex is not None:
        given.append(("regex", body.regex))
    if len(given) > 1:
        raise ApiError(400, "expected one of grammar, regex and response_format, found several", param="grammar")
    return await model.constraint(*given[0]) if given else None


async def submitted(model: ServedModel, requests: Sequence[Request]) -> Job:
    """A job that the scheduler took. Raises its ``UserError``, or ``ApiError`` where the queue is full."""
    job = model.worker.submit(requests)
    try:
        await job.accepted
    except asyncio.CancelledError:
        job.cancel()
        raise
    return job


@asynccontextmanager
async def watched(http: HttpRequest, job: Job) -> AsyncIterator[None]:
    """Cancels the job if the client goes away meanwhile."""
    watcher = asyncio.create_task(cancel_when_gone(http.receive, job))
    try:
        yield
    finally:
        watcher.cancel()
        job.cancel()


def finish_reason(finish: Finish | None, calls: bool) -> str:
    """In OpenAI's words."""
    if finish in ("length", "deadline"):
        return "length"
    return "tool_calls" if calls else "stop"
