"""Anthropic's ``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from tulle.engine.request import Finish
from tulle.engine.request import Sequence as Running
from tulle.serve.conversation import Talk, begin, prompt_of
from tulle.serve.errors import ApiError, unsupported
from tulle.serve.generation import Run
from tulle.serve.routes.chat import Spoken, effort
from tulle.serve.routes.common import answer, log_texts, new_id, note, quote, registry_of, respond, router, sse
from tulle.serve.schemas.anthropic import (
    AnthropicError,
    AnthropicMessage,
    Block,
    CountedTokens,
    CountRequest,
    MessagesRequest,
    Prompted,
    TextBlock,
)
from tulle.serve.served import ServedModel
from tulle.serve.streaming import COMMENT
from tulle.text.tool_formats import Arguments, Content, Delta, Reasoning, ToolCall

routes = router(AnthropicError)


@routes.post("/v1/messages", response_model=AnthropicMessage, tags=["Anthropic"])
async def messages(body: MessagesRequest, http: Request) -> Response:
    """Answers a conversation; with ``stream`` as server-sent events."""

    async def start(model: ServedModel) -> Run:
        talk = talk_of(body, model)
        if body.output_config is not None:
            if body.output_config.format is not None:
                talk.schema = body.output_config.format.schema_
            talk.variables |= effort(body.output_config.effort, model)
        talk.max_tokens = body.max_tokens
        log_texts(http, messages=talk.messages)
        return await begin(model, body, http, talk)

    return await respond(
        http,
        body.model,
        bool(body.stream),
        start,
        lambda run, model: _stream(run, model, body),
        lambda run, model: _whole(http, run, model, body),
    )


@routes.post("/v1/messages/count_tokens", response_model=CountedTokens, tags=["Anthropic"])
async def count_tokens(body: CountRequest, http: Request) -> Response:
    """Tokens of the prompt that a conversation makes."""
    async with registry_of(http).use(body.model) as model:
        note(http, model)
        _, tokens = await prompt_of(model, talk_of(body, model))
        return answer({"input_tokens": len(tokens)})


def talk_of(body: Prompted, model: ServedModel) -> Talk:
    """The conversation in OpenAI's form. Raises ``ApiError`` for what does not go together."""
    found: list[dict[str, Any]] = []
    if body.system:
        found.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        if isinstance(message.content, str):
            found.append({"role": message.role, "content": message.content})
        elif message.role == "user":
            found += _of_user(message.content)
        else:
            found.append(_of_assistant(message.content))
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
        }
        for tool in body.tools or ()
    ]
    choice: Any = "auto"
    parallel = True
    if body.tool_choice is not None:
        parallel = not body.tool_choice.disable_parallel_tool_use
        choice = {"any": "required", "tool": {"type": "function", "function": {"name": body.tool_choice.name}}}.get(
            body.tool_choice.type, body.tool_choice.type
        )
        if choice not in ("auto", "none") and not tools:
            raise ApiError(400, "expected tools with tool_choice, found none", param="tool_choice")
    variables: dict[str, Any] = {}
    if body.thinking is not None:
        wanted = body.thinking.type != "disabled"
        variables = model.thinking(wanted)
        if wanted and not variables and model.format.reasoning is None:
            raise unsupported("thinking", "expected no thinking: this model has none")
    return Talk(found, tools, choice, parallel, variables=variables)


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


def _of_user(blocks: list[Block]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says."""
    found: list[dict[str, Any]] = []
    said = []
    for block in blocks:
        if block.type == "tool_result":
            text = _text(block.content)
            content = f"Error: {text}" if block.is_error else text
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif block.type == "text":
            said.append(block.text or "")
        else:
            raise ApiError(400, f"expected no block of type {block.type} from the user", param="messages")
    return found + ([{"role": "user", "content": "\n".join(said)}] if said or not found else [])


def _of_assistant(blocks: list[Block]) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "\n".join(block.text or "" for block in blocks if block.type == "text"),
    }
    if thoughts := [block.thinking or "" for block in blocks if block.type == "thinking"]:
        message["reasoning_content"] = "\n".join(thoughts)
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in blocks
        if block.type == "tool_use"
    ]
    return message | ({"tool_calls": calls} if calls else {})


def stop_of(
    model: ServedModel, body: MessagesRequest, sequence: Running, finish: Finish | None, calls: bool
) -> dict[str, str | None]:
    """Why an answer ended, in Anthropic's words."""
    stops = body.stops()
    if finish == "stop" and stops:
        text = model.text.decode(sequence.tokens, keep_special=True)
        places = {text.find(stop): stop for stop in reversed(stops) if stop in text}
        return {"stop_reason": "stop_sequence", "stop_sequence": places[min(places)] if places else stops[0]}
    reason = "max_tokens" if finish in ("length", "deadline") else "tool_use" if calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(run: Run) -> dict[str, int]:
    cached = run.cached_tokens
    return {
        "input_tokens": run.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": run.generated,
    }


async def _whole(http: Request, run: Run, model: ServedModel, body: MessagesRequest) -> dict[str, Any]:
    spoken = Spoken()
    finish: Finish | None = None
    async for pieces in run.steps():
        for piece in pieces:
            spoken.add(piece.deltas)
            finish = piece.event.finish or finish
    content: list[dict[str, Any]] = []
    if spoken.reasoning:
        content.append({"type": "thinking", "thinking": "".join(spoken.reasoning), "signature": ""})
    if text := "".join(spoken.content):
        content.append({"type": "text", "text": text})
    for call in spoken.calls:
        function = call["function"]
        content.append({
            "type": "tool_use", "id": call["id"], "name": function["name"], "input": _object(function["arguments"])
        })  # fmt: skip
    log_texts(http, answer=content)
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": model.name,
        "content": content,
        **stop_of(model, body, run.job.sequences[0], finish, bool(spoken.calls)),
        "usage": _usage(run),
    }


def _object(arguments: str) -> dict[str, Any]:
    """Arguments of a call that was cut by the end of the answer are no JSON: they are shown as they are."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"invalid_json": arguments}
    return found if isinstance(found, dict) else {"invalid_json": arguments}


class _Blocks:
    """The blocks of a stream: one is open at a time."""

    def __init__(self) -> None:
        self._kind, self._number, self.calls = "", -1, False
        self._before = ""

    def _open(self, kind: str, block: dict[str, Any], delta: str) -> str:
        written = self.close()
        self._number += 1
        self._kind = kind
        start = {"type": "content_block_start", "index": self._number, "content_block": block}
        self._before = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._number},"delta":{delta}'
        )
        return written + sse(start, "content_block_start")

    def close(self) -> str:
        """Ends the open block, if there is one."""
        if not self._kind:
            return ""
        self._kind = ""
        return sse({"type": "content_block_stop", "index": self._number}, "content_block_stop")

    def write(self, delta: Delta) -> str:
        """The events of a delta."""
        written = ""
        if isinstance(delta, ToolCall):
            self.calls = True
            block: dict[str, Any] = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            return self._open("tool_use", block, '{"type":"input_json_delta","partial_json":')
        if isinstance(delta, Content) and self._kind != "text":
            written = self._open("text", {"type": "text", "text": ""}, '{"type":"text_delta","text":')
        if isinstance(delta, Reasoning) and self._kind != "thinking":
            block = {"type": "thinking", "thinking": "", "signature": ""}
            written = self._open("thinking", block, '{"type":"thinking_delta","thinking":')
        assert isinstance(delta, Content | Reasoning | Arguments)
        return f"{written}{self._before}{quote(delta.text)}}}}}\n\n"


async def _stream(run: Run, model: ServedModel, body: MessagesRequest) -> AsyncIterator[str]:
    message: dict[str, Any] = {
        "id": new_id("msg_"), "type": "message", "role": "assistant", "model": model.name, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": _usage(run) | {"output_tokens": 0},
    }  # fmt: skip
    yield sse({"type": "message_start", "message": message}, "message_start")
    blocks = _Blocks()
    finish: Finish | None = None
    async for pieces in run.steps():
        if not pieces:
            yield COMMENT
            continue
        written = []
        for piece in pieces:
            written += [blocks.write(delta) for delta in piece.deltas]
            finish = piece.event.finish or finish
        yield "".join(written)
    stop = stop_of(model, body, run.job.sequences[0], finish, blocks.calls)
    ending = sse({"type": "message_delta", "delta": stop, "usage": _usage(run)}, "message_delta")
    yield blocks.close() + ending + sse({"type": "message_stop"}, "message_stop")
