"""``POST /v1/responses``: text and calls of functions. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tulle.engine.request import Finish
from tulle.errors import UserError
from tulle.serve.conversation import Talk, begin
from tulle.serve.errors import ApiError
from tulle.serve.generation import Run
from tulle.serve.routes.chat import effort, logprobs_json
from tulle.serve.routes.common import compact, log_texts, new_id, now, quote, respond, router, sse
from tulle.serve.schemas.responses import InputPart, Item, NamedChoice, ResponseObject, ResponsesRequest
from tulle.serve.served import ServedModel
from tulle.serve.streaming import COMMENT
from tulle.text.tool_formats import Arguments, Content, Delta, Reasoning, ToolCall

LOGPROBS = "message.output_text.logprobs"
"""What ``include`` names to get log-probabilities."""
routes = router()


@routes.post("/v1/responses", response_model=ResponseObject, tags=["OpenAI"])
async def responses(body: ResponsesRequest, http: Request) -> Response:
    """Answers a conversation; with ``stream`` as server-sent events."""

    async def start(model: ServedModel) -> Run:
        talk = talk_of(body, model)
        log_texts(http, messages=talk.messages)
        return await begin(model, body, http, talk)

    return await respond(
        http,
        body.model,
        bool(body.stream),
        start,
        lambda run, model: _stream(_Output(run, model, body)),
        lambda run, model: _whole(http, _Output(run, model, body)),
    )


def talk_of(body: ResponsesRequest, model: ServedModel) -> Talk:
    """The conversation in the form of chat completions. Raises ``ApiError`` for what does not go together."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += _messages(body.input)
    if not any(message["role"] != "system" for message in messages):
        raise ApiError(400, "expected a message in the input, found none", param="input")
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in body.tools or ()
    ]
    choice: Any = body.tool_choice or "auto"
    if isinstance(choice, NamedChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    if choice not in ("auto", "none") and not tools:
        raise ApiError(400, "expected tools with tool_choice, found none", param="tool_choice")
    form = body.text.format if body.text is not None else None
    schema = None
    if form is not None and form.type != "text":
        schema = {"type": "object"} if form.type == "json_object" else form.schema_
    wants = LOGPROBS in (body.include or ())
    return Talk(
        messages,
        tools,
        choice,
        body.parallel_tool_calls is not False,
        schema,
        effort(body.reasoning.effort if body.reasoning is not None else None, model),
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if wants or body.top_logprobs else None,
    )


def _messages(items: list[Item]) -> list[dict[str, Any]]:
    """What the assistant thinks, says and calls in a row is one message."""
    found: list[dict[str, Any]] = []
    thoughts: list[str] = []

    def assistant() -> dict[str, Any]:
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        if thoughts:
            found[-1]["reasoning_content"] = "\n".join(thoughts)
            thoughts.clear()
        return found[-1]

    for item in items:
        if item.type == "reasoning":
            thoughts.append(_text(item.content))
        elif item.type == "function_call":
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif item.role == "assistant":
            found.append({"role": "assistant", "content": _text(item.content)})
            assistant()
        else:
            found.append({"role": item.role, "content": _text(item.content)})
    return found


def _text(content: str | list[InputPart] | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal or "" for part in content or ())


class _Output:
    """The items of an answer as they come; the events of a stream beside them."""

    def __init__(self, run: Run, model: ServedModel, body: ResponsesRequest):
        self.run, self.model, self._body = run, model, body
        self.items: list[dict[str, Any]] = []
        self._identity, self._created = new_id("resp_"), now()
        self._texts: list[str] = []
        """Of the item that is open."""
        self._kind = ""
        self._finish: Finish | None = None
        self._number = 0
        self._logprobs: list[dict[str, Any]] = []

    # Events

    def event(self, kind: str, **content: Any) -> str:
        """One event, with its number."""
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **content}, kind)

    def begin(self) -> str:
        return self.event("response.created", response=self.response()) + self.event(
            "response.in_progress", response=self.response()
        )

    def take(self, deltas: Any, logprobs: Any, finish: Finish | None) -> str:
        """The events of one step."""
        found = [] if logprobs is None else [logprobs_json(self.model.tokens, logprobs)]
        written = []
        for delta in deltas:
            written.append(self._delta(delta, found if isinstance(delta, Content) else []))
            if isinstance(delta, Content):
                found = []
        if found and self._kind == "message":
            self._logprobs += found
        self._finish = finish or self._finish
        return "".join(written)

    def _delta(self, delta: Delta, logprobs: list[dict[str, Any]]) -> str:
        written = ""
        item: dict[str, Any]
        if isinstance(delta, ToolCall):
            item = {
                "id": new_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": delta.id,
                "name": delta.name, "arguments": "",
            }  # fmt: skip
            return self._open("function_call", item)
        if isinstance(delta, Content):
            if self._kind != "message":
                item = {
                    "id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant", "content": []
                }  # fmt: skip
                written = self._open("message", item)
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                written += self.event("response.content_part.added", **self._place(), content_index=0, part=part)
            self._logprobs += logprobs
            kind, more = "response.output_text.delta", f',"content_index":0,"logprobs":{compact(logprobs)}'
        elif isinstance(delta, Reasoning):
            if self._kind != "reasoning":
                item = {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
                written = self._open("reasoning", item)
            kind, more = "response.reasoning_text.delta", ',"content_index":0'
        else:
            assert isinstance(delta, Arguments)
            kind, more = "response.function_call_arguments.delta", ""
        self._texts.append(delta.text)
        self._number += 1
        place = f'"item_id":"{self.items[-1]["id"]}","output_index":{len(self.items) - 1}'
        return (
            f'{written}event: {kind}\ndata: {{"type":"{kind}","sequence_number":{self._number - 1},{place}{more},'
            f'"delta":{quote(delta.text)}}}\n\n'
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _open(self, kind: str, item: dict[str, Any]) -> str:
        written = self._close("completed")
        self._kind = kind
        self.items.append(item)
        return written + self.event("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _close(self, status: str) -> str:
        """Ends the open item, if there is one."""
        if not self._kind:
            return ""
        kind, text, item = self._kind, "".join(self._texts), self.items[-1]
        self._kind, self._texts = "", []
        written = ""
        if kind == "message":
            logprobs, self._logprobs = self._logprobs, []
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
            item = item | {"content": [part]}
            place = self._place() | {"content_index": 0}
            written = self.event("response.output_text.done", **place, text=text, logprobs=logprobs)
            written += self.event("response.content_part.done", **place, part=part)
        elif kind == "reasoning":
            item = item | {"content": [{"type": "reasoning_text", "text": text}]}
            written = self.event("response.reasoning_text.done", **self._place(), content_index=0, text=text)
        else:
            item = item | {"arguments": text}
            done = "response.function_call_arguments.done"
            written = self.event(done, **self._place(), name=item["name"], arguments=text)
        self.items[-1] = item | {"status": status}
        return written + self.event("response.output_item.done", output_index=len(self.items) - 1, item=self.items[-1])

    def end(self) -> str:
        """The last events."""
        cut = self._finish in ("length", "deadline")
        written = self._close("incomplete" if cut else "completed")
        kind = "response.incomplete" if cut else "response.completed"
        return written + self.event(kind, response=self.response())

    def failed(self, message: str, code: str) -> str:
        """The last event of an answer that cannot go on."""
        error = {"code": code, "message": message}
        return self.event("response.failed", response=self.response() | {"status": "failed", "error": error})

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        body, finish = self._body, self._finish
        cut = finish in ("length", "deadline")
        reason = "max_output_tokens" if finish == "length" else "deadline"
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedChoice) else body.tool_choice
        form = body.text.format if body.text is not None else None
        return {
            "id": self._identity,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if finish is None else "incomplete" if cut else "completed",
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model.name,
            "output": self.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": form.model_dump(exclude_none=True, by_alias=True) if form else {"type": "text"}},
            "tool_choice": choice or "auto",
            "tools": tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if finish is None else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        run = self.run
        return {
            "input_tokens": run.prompt_tokens,
            "input_tokens_details": {"cached_tokens": run.cached_tokens},
            "output_tokens": run.generated,
            "output_tokens_details": {"reasoning_tokens": run.reasoning_tokens},
            "total_tokens": run.prompt_tokens + run.generated,
        }


async def _whole(http: Request, output: _Output) -> dict[str, Any]:
    async for pieces in output.run.steps():
        for piece in pieces:
            output.take(piece.deltas, piece.event.logprobs, piece.event.finish)
    output.end()
    log_texts(http, answer=output.items)
    return output.response()


async def _stream(output: _Output) -> AsyncIterator[str]:
    yield output.begin()
    try:
        async for pieces in output.run.steps():
            if not pieces:
                yield COMMENT
                continue
            yield "".join(output.take(p.deltas, p.event.logprobs, p.event.finish) for p in pieces)
    except (HTTPException, UserError) as error:
        yield output.failed(str(getattr(error, "detail", error)), getattr(error, "code", None) or "server_error")
        return
    yield output.end()
