"""Conversations in OpenAI's form, made to what a model's chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tulle.errors import UserError
from tulle.text.chat_template import chosen_template
from tulle.text.template_facts import TemplateFacts, template_facts
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.generic import describe_tools
from tulle.text.tool_formats.tools import Choice, Tool, read_tools

SYSTEM_ROLES = ("system", "developer")
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's parts that hold text, in OpenAI's two APIs."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """What :meth:`ModelTokenizer.chat` is given."""

    messages: Messages
    tools: list[dict[str, Any]] | None


def prepare_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: ModelTokenizer,
    tool_format: ToolFormat,
    tools: Sequence[Mapping[str, Any] | Tool] | None = None,
    choice: Choice = "auto",
) -> Conversation:
    """The conversation as the model's template takes it; ``messages`` stay as they are.

    - Content is text: parts are joined by newlines, None is ''.
    - ``developer`` is ``system`` where the template does not know it; a system message that it does not know goes into
      the first user message.
    - Arguments of calls are objects, or JSON text where the template wants text. Results have their call's ``name``.
      Ids are as the template takes them.
    - Where the template has no tools, they are described in the system message. Calls and results that it does not
      show become text: calls as the model writes them, results as the user's.

    Raises ``UserError`` for messages without a role, and for parts that are no text.
    """
    known = read_tools(tools)
    facts = template_facts(chosen_template(tokenizer.templates, None, known or None), tokenizer.special)
    prepared = _named([_message(message, tool_format) for message in messages])
    prepared = [message for part in prepared for message in _calls(part, facts, tool_format)]
    if known and not tool_format.supports_tools:
        prepared = _with_system(prepared, describe_tools(known, choice, tool_format))
    prepared = _merged_results(_roles(prepared, facts))
    shown = [_as_openai(tool) for tool in known] if known and tool_format.supports_tools else None
    if shown and facts.system_tools:
        prepared = _with_system(prepared, "")
        functions = json.dumps([tool["function"] for tool in shown], ensure_ascii=False)
        return Conversation([{**prepared[0], "tools": functions}, *prepared[1:]], None)
    return Conversation(prepared, shown)


def _message(message: Mapping[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise UserError("expected messages with a role, found one without; give role, such as user")
    found = {key: value for key, value in message.items() if value is not None}
    found["content"] = content_text(message.get("content"))
    if "tool_call_id" in found:
        found["tool_call_id"] = tool_format.template_id(str(found["tool_call_id"]))
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call, tool_format) for call in found["tool_calls"]]
        if not found["tool_calls"]:
            del found["tool_calls"]
    return found


def content_text(content: object) -> str:
    """The text of a message's content. Raises ``UserError`` where it holds something else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    pieces = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (isinstance(part, Mapping) and kind not in (*TEXT_PARTS, "refusal")):
            raise UserError(f"expected content of text, found a part of type {kind!r}; this model reads text alone")
        pieces.append(text)
    return "\n".join(pieces)


def _call(call: Mapping[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError("expected tool_calls with function.name, found one without; give it")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _object(arguments)
    return {
        **call,
        "type": "function",
        "id": tool_format.template_id(str(call.get("id") or "")),
        "function": {**function, "arguments": arguments or {}},
    }


def _object(text: str) -> dict[str, Any]:
    """The arguments; what is no object stays visible, so that a conversation with a broken call goes on."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"invalid_json": text}


def _named(messages: Messages) -> Messages:
    """Results with the names of their calls, which some templates show."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
    return messages


def _calls(message: dict[str, Any], facts: TemplateFacts, tool_format: ToolFormat) -> Messages:
    """The message, with calls and results in a form that the template shows."""
    if message["role"] == "tool" and not (facts.results and tool_format.native):
        title = f"Result of {message['name']}:" if "name" in message else "Result of the tool:"
        return [{"role": "user", "content": f"{title}\n{message['content']}", "is_result": True}]
    if "tool_calls" not in message:
        return [message]
    if not (facts.call and tool_format.native):
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        text = "\n".join([*([message["content"]] if message["content"] else []), tool_format.written(calls)])
        return [{**{k: v for k, v in message.items() if k != "tool_calls"}, "content": text}]
    if facts.text_arguments:
        for call in message["tool_calls"]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return [message]


def _with_system(messages: Messages, text: str) -> Messages:
    if messages and messages[0]["role"] in SYSTEM_ROLES:
        content = "\n\n".join(part for part in (messages[0]["content"], text) if part)
        return [{**messages[0], "content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _roles(messages: Messages, facts: TemplateFacts) -> Messages:
    found: Messages = []
    waiting: list[str] = []
    for message in messages:
        role = message["role"]
        if role == "developer" and not facts.developer:
            role = "system"
        if role == "system" and not facts.system:
            waiting.append(message["content"])
        elif role == "user" and waiting:
            found.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            found.append({**message, "role": role})
    return found + ([{"role": "user", "content": "\n\n".join(waiting)}] if waiting else [])


def _merged_results(messages: Messages) -> Messages:
    """Results that became the user's, and what the user says next, as one message: many templates want turns."""
    found: Messages = []
    for message in messages:
        if found and message["role"] == "user" and found[-1].get("is_result"):
            found[-1] = {**message, "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append(message)
    return [{key: value for key, value in message.items() if key != "is_result"} for message in found]


def _as_openai(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
