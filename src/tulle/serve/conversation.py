"""A conversation that goes on: what chat completions, responses and Anthropic's messages have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from tulle.engine.request import Constraint
from tulle.serve.errors import ApiError, unsupported
from tulle.serve.generation import PlainText, Run, constraint_of, deadline_of, requests_of, submitted
from tulle.serve.schemas.common import Generating
from tulle.serve.served import ServedModel
from tulle.text.messages import prepare_messages
from tulle.text.tool_formats import Choice
from tulle.text.tool_formats.lark import Lark

RESERVED = frozenset({"messages", "tools", "documents", "template", "add_generation_prompt", "self"})
"""Names of a template's variables that a request cannot set; nor the special tokens'."""


@dataclass
class Talk:
    """What is to be answered, and how."""

    messages: list[dict[str, Any]]
    """In OpenAI's form."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """In OpenAI's form."""
    choice: Choice = "auto"
    """auto, none, required, or a mapping that names one function."""
    parallel: bool = True
    """Several calls may come where one must."""
    schema: Any = None
    """JSON Schema of the answer; ``{"type": "object"}`` for any object; None: it is free."""
    variables: dict[str, Any] = field(default_factory=dict)
    """What else the model's template reads."""
    count: int = 1
    max_tokens: int | None = None
    logprobs: int | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that may be called."""
        return [] if self.choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        return self.choice not in ("auto", "none")


def characters(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> int:
    """About how long a conversation is."""
    return sum(len(str(message)) for message in messages) + sum(len(str(tool)) for tool in tools)


def render(model: ServedModel, talk: Talk) -> tuple[str, list[int]]:
    """The text and the tokens of a conversation. Raises ``UserError``."""
    if not model.text.templates:
        raise ApiError(
            400, "expected a model with a chat template, found none; use /v1/completions", code="no_chat_template"
        )
    for name in talk.variables:
        if name in RESERVED or name in model.text.special:
            raise ApiError(400, f"expected no {name!r} in chat_template_kwargs: it is not a request's to set")
    tools = talk.offered or None
    prepared = prepare_messages(talk.messages, model.text, model.format, tools, talk.choice)
    text = model.text.chat(prepared.messages, tools=prepared.tools, **talk.variables)
    return text, model.encode(text, special=False)


async def prompt_of(model: ServedModel, talk: Talk) -> tuple[str, list[int]]:
    """See :func:`render`; in a thread where it is long."""
    found: tuple[str, list[int]] = await model.off_loop(characters(talk.messages, talk.tools), render, model, talk)
    return found


async def begin(model: ServedModel, body: Generating, http: HttpRequest, talk: Talk) -> Run:
    """Makes the prompt and puts the requests into the queue. Raises ``UserError`` or ``ApiError``."""
    deadline = deadline_of(body.timeout, http)
    text, prompt = await prompt_of(model, talk)
    constraint = await _constraint(model, body, talk, text)
    marked = bool(talk.offered) or model.format.marks_answers
    requests = requests_of(
        model,
        prompt,
        body,
        talk.count,
        talk.max_tokens,
        keep_special=marked and model.format.keep_special,
        constraint=constraint,
        logprobs=talk.logprobs,
        deadline=deadline,
    )
    job = await submitted(model, requests)
    eager = bool(body.stream)
    parsers = [
        model.format.parser(talk.offered, text, eager=eager) if marked else PlainText() for _ in range(talk.count)
    ]
    return Run(job, parsers, len(prompt), talk.count)


async def _constraint(model: ServedModel, body: Generating, talk: Talk, prompt: str) -> Callable[[], Constraint] | None:
    """Of calls that must come, of the answer's schema, or of a grammar in the request."""
    own = body.grammar is not None or body.regex is not None
    if talk.must_call:
        if talk.schema is not None or own:
            raise unsupported("tool_choice", "expected no grammar or format of the answer where a call must come")
        return await model.constraint("lark", model.format.grammar(talk.tools, talk.choice, talk.parallel, prompt))
    if talk.schema is None:
        return await constraint_of(model, body, None)
    if own:
        raise ApiError(400, "expected one of grammar, regex and a format of the answer, found several")
    if talk.offered:
        raise unsupported("response_format", "expected no response_format beside tools that may be called")
    if not model.format.marks_answers:
        return await model.constraint("json_schema", json.dumps(talk.schema))
    lark = Lark(model.format.tokens)
    before = model.format.before_answer(lark, prompt)
    return await model.constraint("lark", lark.start(f"{before}{lark.json(talk.schema)}"))
