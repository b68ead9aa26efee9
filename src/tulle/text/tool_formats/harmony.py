"""gpt-oss: messages on channels. ``analysis`` is reasoning; calls are messages to ``functions.NAME``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tulle.text.reasoning import ReasoningMarks
from tulle.text.tool_formats.calls import lark_call, read_arguments
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import NoMatch, Reading
from tulle.text.tool_formats.tools import Tool

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
NAMESPACE = "functions."
_ROLE = re.compile("[a-z]*")
_CHANNEL, _RECIPIENT = re.compile(r"<\|channel\|>\s*(\w+)"), re.compile(r"\bto=([^\s<]+)")
_OPEN = re.compile(r"<\|channel\|>(\w+)[^<]*<\|message\|>[^<]*\Z")
"""A prompt that ends inside a message."""


class Channels(ReasoningMarks):
    """Reasoning is the channel ``analysis``; the answer has a head of its own."""

    def opened(self, prompt: str) -> bool:
        found = _OPEN.search(prompt)
        return found is not None and found[1] == "analysis"

    def grammar(self, lark: Lark, opened: bool) -> str:
        return f"{_thoughts(lark, opened)}{lark.text(f'{CHANNEL}final{MESSAGE}')} "


def _thoughts(lark: Lark, opened: bool) -> str:
    body = f"{lark.before(END)} {lark.text(f'{START}assistant')}"
    return f"{body} " if opened else f"({lark.text(f'{CHANNEL}analysis{MESSAGE}')} {body})? "


@dataclass(frozen=True)
class Harmony(ToolFormat):
    """A call ends the answer, so that there is one at most."""

    name = "harmony"
    marks = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
    hints = (CHANNEL, MESSAGE)

    reasoning: ReasoningMarks | None = Channels(f"{CHANNEL}analysis{MESSAGE}", END)

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        return super().hinted(template, tokens, model_type) or model_type == "gpt_oss"

    def _read(self, parser: Parser, prompt: str) -> Reading[None]:
        source = parser.source
        opened = _OPEN.search(prompt)
        if opened:
            yield from self._read_body(parser, opened[1])
        while (yield from source.peek()):
            channel = yield from parser.attempt(self._read_message(parser))
            if channel is None:
                # No message: content up to where one may begin.
                if (yield from source.peek()) == "<":
                    parser.content(source.take(1))
                yield from source.until((START, CHANNEL), parser.content)
            elif channel:
                yield from self._read_body(parser, channel)

    def _read_answer(self, parser: Parser) -> Reading[None]:
        raise NotImplementedError

    def _read_message(self, parser: Parser) -> Reading[str]:
        """A message's head, and all of it where it is a call: then ''. Gives the channel."""
        source = parser.source
        if (yield from source.literal(START)):
            yield from source.span(_ROLE)
        if not (yield from source.literal(CHANNEL, " to=")):
            raise NoMatch
        pieces: list[str] = []
        if (yield from source.until((MESSAGE, START, END, CALL, RETURN), pieces.append)) != MESSAGE:
            raise NoMatch
        head = "".join(source.record)
        source.take(len(MESSAGE))
        recipient = _RECIPIENT.search(head)
        if recipient:
            yield from source.spaces()
            yield from read_arguments(parser, recipient[1].removeprefix(NAMESPACE))
            parser.end_call()
            yield from source.spaces()
            yield from source.literal(CALL, END, RETURN)
            return ""
        channel = _CHANNEL.search(head)
        if not channel:
            raise NoMatch
        return channel[1]

    def _read_body(self, parser: Parser, channel: str) -> Reading[None]:
        give = parser.reasoning if channel == "analysis" else parser.content
        if (yield from parser.source.until((END, CALL, RETURN, START), give)) != START:
            yield from parser.source.literal(END, CALL, RETURN)
        if channel == "analysis":
            parser.end_reasoning()

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        head, tail = f"{CHANNEL}commentary to={NAMESPACE}", f" {CONSTRAIN}json{MESSAGE}"
        return lark.rule(either([lark_call(lark, tool, head + tool.name + tail, "") for tool in tools]), "call")

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        heads = (f"{CHANNEL}commentary to={NAMESPACE}{name} {CONSTRAIN}json{MESSAGE}" for name, _ in calls)
        bodies = (json.dumps(arguments, ensure_ascii=False) for _, arguments in calls)
        return f"{START}assistant".join(f"{head}{body}{CALL}" for head, body in zip(heads, bodies, strict=True))

    def _thoughts(self, lark: Lark, prompt: str) -> str:
        return _thoughts(lark, self.reasoning is not None and self.reasoning.opened(prompt))
