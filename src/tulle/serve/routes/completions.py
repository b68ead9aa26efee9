"""``POST /v1/completions``: text that goes on, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response

from tulle.engine.request import Sequence as Running
from tulle.engine.sampling import TokenLogprobs
from tulle.serve.generation import (
    PlainText,
    Run,
    constraint_of,
    deadline_of,
    finish_reason,
    requests_of,
    submitted,
)
from tulle.serve.routes.chat import finite, stop_reason
from tulle.serve.routes.common import (
    compact,
    fingerprint,
    log_texts,
    new_id,
    now,
    quote,
    respond,
    router,
)
from tulle.serve.schemas.openai import Completion, CompletionRequest
from tulle.serve.served import ServedModel
from tulle.serve.streaming import COMMENT, DONE
from tulle.text.tool_formats import Content

if TYPE_CHECKING:
    from tulle.engine.grammar import Kind

DEFAULT_TOKENS = 16
"""As at OpenAI."""
routes = router()


@routes.post("/v1/completions", response_model=Completion, tags=["OpenAI"])
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Continues prompts; with ``stream`` as server-sent events."""
    log_texts(http, prompt=body.prompt)
    prompts: list[list[int]] = []

    async def begin(model: ServedModel) -> Run:
        prompts.extend(await prompts_of(model, body.prompt, body.add_special_tokens is not False))
        return await _begin(model, body, http, prompts)

    return await respond(
        http,
        body.model,
        bool(body.stream),
        begin,
        lambda run, model: _stream(run, model, body, prompts),
        lambda run, model: _whole(http, run, model, body, prompts),
    )


async def prompts_of(model: ServedModel, given: Any, special: bool) -> list[list[int]]:
    """The tokens of one or more prompts, each a text or tokens."""
    listed = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    size = sum(len(one) for one in listed if isinstance(one, str))

    def encoded() -> list[list[int]]:
        return [model.encode(one, special) if isinstance(one, str) else one for one in listed]

    found: list[list[int]] = await model.off_loop(size, encoded)
    return found


async def _begin(model: ServedModel, body: CompletionRequest, http: Request, prompts: Sequence[Sequence[int]]) -> Run:
    deadline = deadline_of(body.timeout, http)
    format: tuple[Kind, str] | None = None
    if body.response_format is not None and body.response_format.type != "text":
        schema = {"type": "object"} if (named := body.response_format.json_schema) is None else named.schema_
        format = ("json_schema", compact(schema))
    constraint = await constraint_of(model, body, format)
    made = body.best_of or body.n or 1
    ranked = made > (body.n or 1)
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    scores = body.logprobs if body.echo else None
    if most == 0 and scores is None:
        scores = 0
    requests = []
    for prompt in prompts:
        requests += requests_of(
            model,
            prompt,
            body,
            made,
            most,
            constraint=constraint,
            logprobs=body.logprobs if body.logprobs is not None or not ranked else 0,
            prompt_logprobs=scores,
            deadline=deadline,
        )
    job = await submitted(model, requests)
    return Run(job, [PlainText() for _ in requests], sum(map(len, prompts)), made)


class _Logprobs:
    """Log-probabilities in the shape of completions."""

    def __init__(self, model: ServedModel, offset: int = 0):
        self._tokens, self._offset = model.tokens, offset
        self.found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, given: TokenLogprobs | None) -> None:
        """A token's; the first of a prompt has none."""
        text = self._tokens.text(token)
        top = None
        if given is not None:
            top = {self._tokens.text(other): finite(value) for other, value in given.top}
            top.setdefault(text, finite(given.logprob))
        self.found["tokens"].append(text)
        self.found["token_logprobs"].append(None if given is None else finite(given.logprob))
        self.found["top_logprobs"].append(top)
        self.found["text_offset"].append(self._offset)
        self._offset += len(text)

    def take(self) -> dict[str, list[Any]]:
        """What was added since the last call."""
        found, self.found = self.found, {name: [] for name in self.found}
        return found


class _Echo:
    """The prompt as a part of the answer."""

    def __init__(self, model: ServedModel, body: CompletionRequest, prompts: Sequence[Sequence[int]]):
        self._on, self._model, self._prompts = bool(body.echo), model, prompts
        given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        self._given = given

    def text(self, number: int) -> str:
        """Of a prompt: as it was sent, or what its tokens say."""
        if not self._on:
            return ""
        given = self._given[number] if number < len(self._given) else None
        return given if isinstance(given, str) else self._model.text.decode(self._prompts[number])

    def logprobs(self, sequence: Running, to: _Logprobs) -> None:
        if self._on:
            for token, found in zip(sequence.request.prompt, sequence.prompt_logprobs, strict=False):
                to.add(token, found)


async def _whole(
    http: Request, run: Run, model: ServedModel, body: CompletionRequest, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    made, wanted = body.best_of or body.n or 1, body.n or 1
    echo = _Echo(model, body, prompts)
    total = made * len(prompts)
    texts: list[list[str]] = [[echo.text(number // made)] for number in range(total)]
    logprobs = [_Logprobs(model) for _ in range(total)]
    begun, likelihood = [False] * total, [0.0] * total
    finish: list[Any] = [None] * total
    async for pieces in run.steps():
        for piece in pieces:
            number, event = piece.number, piece.event
            if not begun[number]:
                begun[number] = True
                echo.logprobs(event.sequence, logprobs[number])
            if event.text:
                texts[number].append(event.text)
            if event.logprobs is not None:
                logprobs[number].add(event.logprobs.token, event.logprobs)
                likelihood[number] += event.logprobs.logprob
            if event.finish is not None:
                finish[number] = event.finish
    choices: list[dict[str, Any]] = []
    for prompt in range(len(prompts)):
        numbers = list(range(prompt * made, (prompt + 1) * made))
        if made > wanted:
            mean = {n: likelihood[n] / max(len(run.job.sequences[n].tokens), 1) for n in numbers}
            numbers = sorted(numbers, key=lambda n: -mean[n])[:wanted]
        for number in numbers:
            choice = {
                "index": len(choices),
                "text": "".join(texts[number]),
                "logprobs": logprobs[number].found if body.logprobs is not None else None,
                "finish_reason": finish_reason(finish[number], False),
            }
            choices.append(choice | stop_reason(finish[number]))
    log_texts(http, answers=[choice["text"] for choice in choices])
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": now(),
        "model": model.name,
        "choices": choices,
        "usage": run.usage(),
        "system_fingerprint": fingerprint(),
    }


async def _stream(
    run: Run, model: ServedModel, body: CompletionRequest, prompts: Sequence[Sequence[int]]
) -> AsyncIterator[str]:
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = {
        "id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": model.name,
        "system_fingerprint": fingerprint(),
    }  # fmt: skip
    opening = "data: " + compact(head)[:-1] + ',"choices":['
    tail = (',"usage":null' if usage else "") + "}\n\n"
    made = body.n or 1
    echo = _Echo(model, body, prompts)
    total = made * len(prompts)
    before = [f'{opening}{{"index":{number},"text":' for number in range(total)]
    plain = f',"logprobs":null,"finish_reason":null}}]{tail}'
    logprobs = [_Logprobs(model) for _ in range(total)]
    begun = [False] * total
    async for pieces in run.steps():
        if not pieces:
            yield COMMENT
            continue
        written: list[str] = []
        for piece in pieces:
            number, event = piece.number, piece.event
            text = "".join(delta.text for delta in piece.deltas if isinstance(delta, Content))
            if not begun[number]:
                begun[number] = True
                text = echo.text(number // made) + text
                echo.logprobs(event.sequence, logprobs[number])
            if event.logprobs is not None:
                logprobs[number].add(event.logprobs.token, event.logprobs)
            after = plain
            if event.finish is not None or body.logprobs is not None:
                found = compact(logprobs[number].take()) if body.logprobs is not None else "null"
                reason = "null" if event.finish is None else f'"{finish_reason(event.finish, False)}"'
                more = compact(stop_reason(event.finish))[1:-1]
                after = f',"logprobs":{found},"finish_reason":{reason}{"," + more if more else ""}}}]{tail}'
            if text or after is not plain:
                written.append(f"{before[number]}{quote(text)}{after}")
        yield "".join(written)
    yield (f'{opening}],"usage":{compact(run.usage())}}}\n\n' if usage else "") + DONE
