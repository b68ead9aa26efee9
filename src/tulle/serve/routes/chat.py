"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from tulle.engine.sampling import TokenLogprobs
from tulle.serve.conversation import Talk, begin
from tulle.serve.errors import ApiError, unsupported
from tulle.serve.generation import Run, finish_reason
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
from tulle.serve.schemas.openai import ChatCompletion, ChatRequest, NamedTool
from tulle.serve.served import ServedModel
from tulle.serve.streaming import COMMENT, DONE
from tulle.serve.token_text import TokenTexts
from tulle.text.tool_formats import Arguments, Content, Delta, Reasoning, ToolCall

routes = router()


@routes.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"])
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """Answers a conversation; with ``stream`` as server-sent events."""
    log_texts(http, messages=[message.model_dump(exclude_none=True) for message in body.messages])
    return await respond(
        http,
        body.model,
        bool(body.stream),
        lambda model: begin(model, body, http, talk_of(body, model)),
        lambda run, model: _stream(run, model, body),
        lambda run, model: _whole(http, run, model, body),
    )


def talk_of(body: ChatRequest, model: ServedModel) -> Talk:
    """The conversation of a request. Raises ``ApiError`` for what does not go together."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "expected logprobs true with top_logprobs, found none", param="top_logprobs")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice: Any = body.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        choice = choice.model_dump()
    if choice not in ("auto", "none") and not tools:
        raise ApiError(400, "expected tools with tool_choice, found none", param="tool_choice")
    schema: Any = None
    if body.response_format is not None and body.response_format.type == "json_object":
        schema = {"type": "object"}
    elif body.response_format is not None and body.response_format.json_schema is not None:
        schema = body.response_format.json_schema.schema_
    return Talk(
        messages=[message.model_dump(exclude_none=True) for message in body.messages],
        tools=tools,
        choice=choice,
        parallel=body.parallel_tool_calls is not False,
        schema=schema,
        variables=dict(body.chat_template_kwargs or {}) | effort(body.reasoning_effort, model),
        count=body.n or 1,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def effort(wanted: str | None, model: ServedModel) -> dict[str, Any]:
    """``reasoning_effort`` as the model's template has it. Raises ``ApiError`` where it has nothing like it."""
    if wanted is None:
        return {}
    if "reasoning_effort" in model.variables:
        return {"reasoning_effort": wanted}
    if switch := model.thinking(wanted not in ("none", "minimal")):
        return switch
    raise unsupported("reasoning_effort", "expected no reasoning_effort: this model's chat template has none")


def logprobs_json(tokens: TokenTexts, found: TokenLogprobs) -> dict[str, Any]:
    """A token's log-probabilities in the shape of chat completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, raw = tokens.both(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

    return one(found.token, found.logprob) | {"top_logprobs": [one(*pair) for pair in found.top]}


def finite(logprob: float) -> float:
    """JSON has no minus infinity; -9999 stands for it, as at OpenAI."""
    return max(logprob, -9999.0)


class Spoken:
    """One answer as its deltas add up."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, Content):
                self.content.append(delta.text)
            elif isinstance(delta, Reasoning):
                self.reasoning.append(delta.text)
            elif isinstance(delta, ToolCall):
                function = {"name": delta.name, "arguments": ""}
                self.calls.append({"id": delta.id, "type": "function", "function": function})
            else:
                self.calls[delta.index]["function"]["arguments"] += delta.text

    def message(self) -> dict[str, Any]:
        """In OpenAI's form."""
        text = "".join(self.content)
        found: dict[str, Any] = {
            "role": "assistant", "content": text if text or not self.calls else None, "refusal": None
        }  # fmt: skip
        if self.reasoning:
            found["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            found["tool_calls"] = self.calls
        return found


async def _whole(http: Request, run: Run, model: ServedModel, body: ChatRequest) -> dict[str, Any]:
    count = body.n or 1
    answers = [Spoken() for _ in range(count)]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    finish: list[Any] = [None] * count
    async for pieces in run.steps():
        for piece in pieces:
            answers[piece.number].add(piece.deltas)
            if piece.event.logprobs is not None:
                logprobs[piece.number].append(logprobs_json(model.tokens, piece.event.logprobs))
            if piece.event.finish is not None:
                finish[piece.number] = piece.event.finish
    choices = []
    for number, spoken in enumerate(answers):
        choice = {
            "index": number,
            "message": spoken.message(),
            "logprobs": {"content": logprobs[number], "refusal": None} if body.logprobs else None,
            "finish_reason": finish_reason(finish[number], bool(spoken.calls)),
        }
        choices.append(choice | stop_reason(finish[number]))
    log_texts(http, answers=[spoken.message() for spoken in answers])
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": now(),
        "model": model.name,
        "choices": choices,
        "usage": run.usage(),
        "system_fingerprint": fingerprint(),
    }


def stop_reason(finish: str | None) -> dict[str, str]:
    """What OpenAI has no word for."""
    return {"stop_reason": "deadline"} if finish == "deadline" else {}


async def _stream(run: Run, model: ServedModel, body: ChatRequest) -> AsyncIterator[str]:
    """Chunks, whose constant parts are written once."""
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = {
        "id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": now(), "model": model.name,
        "system_fingerprint": fingerprint(),
    }  # fmt: skip
    tail = (',"usage":null' if usage else "") + "}\n\n"
    opening = "data: " + compact(head)[:-1] + ',"choices":['
    count = body.n or 1
    before = [f'{opening}{{"index":{number},"delta":' for number in range(count)]
    plain = ',"logprobs":null,"finish_reason":null}]' + tail
    called = [False] * count
    yield "".join(f'{before[number]}{{"role":"assistant","content":""}}{plain}' for number in range(count))
    async for pieces in run.steps():
        if not pieces:
            yield COMMENT
            continue
        written: list[str] = []
        for piece in pieces:
            number, event = piece.number, piece.event
            after = plain
            if event.logprobs is not None:
                found = compact({"content": [logprobs_json(model.tokens, event.logprobs)], "refusal": None})
                after = f',"logprobs":{found},"finish_reason":null}}]{tail}'
                if not piece.deltas:
                    written.append(f'{before[number]}{{"content":""}}{after}')
            for delta in piece.deltas:
                written.append(f"{before[number]}{delta_json(delta)}{after}")
                after = plain
                called[number] |= isinstance(delta, ToolCall)
            if event.finish is not None:
                reason = finish_reason(event.finish, called[number])
                more = compact(stop_reason(event.finish))[1:-1]
                ending = f',"logprobs":null,"finish_reason":"{reason}"{"," + more if more else ""}}}]{tail}'
                written.append(f"{before[number]}{{}}{ending}")
        yield "".join(written)
    yield (f'{opening}],"usage":{compact(run.usage())}}}\n\n' if usage else "") + DONE


def delta_json(delta: Delta) -> str:
    """A delta in the shape of chat completion chunks."""
    if isinstance(delta, Content):
        return f'{{"content":{quote(delta.text)}}}'
    if isinstance(delta, Reasoning):
        return f'{{"reasoning_content":{quote(delta.text)}}}'
    if isinstance(delta, ToolCall):
        function = f'{{"name":{quote(delta.name)},"arguments":""}}'
        call = f'{{"index":{delta.index},"id":{quote(delta.id)},"type":"function","function":{function}}}'
        return f'{{"tool_calls":[{call}]}}'
    assert isinstance(delta, Arguments)
    return f'{{"tool_calls":[{{"index":{delta.index},"function":{{"arguments":{quote(delta.text)}}}}}]}}'
