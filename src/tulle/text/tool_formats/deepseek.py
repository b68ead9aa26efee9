"""DeepSeek: a name and the JSON of its arguments between marks; V3 and R1 write the arguments in a code fence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tulle.text.tool_formats.calls import lark_call, read_arguments
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Tool

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
KIND, FENCE, FENCE_END = "function", "```json", "```"
"""V3 writes what kind of tool it is before the name."""
_NAME = re.compile(r"[^\s<>｜{}`]*")


class DeepSeek31(ToolFormat):
    """V3.1; its parser reads V3's form, too."""

    name = "deepseek-v3.1"
    marks: ClassVar[tuple[str, ...]] = (CALLS, CALLS_END, CALL, CALL_END, SEPARATOR)
    hints: ClassVar[tuple[str, ...]] = (CALLS, SEPARATOR)
    parts: ClassVar[tuple[str, str, str]] = (CALL, SEPARATOR, CALL_END)
    """What is before the name, between it and the arguments, and after them."""
    between: ClassVar[str] = ""

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((CALLS, CALL), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.literal(CALLS)
        yield from source.spaces()
        yield from source.expect(CALL)
        while True:
            yield from self._read_call(parser)
            yield from source.spaces()
            if (yield from source.literal(CALL, CALLS_END)) != CALL:
                return

    def _read_call(self, parser: Parser) -> Reading[None]:
        source = parser.source
        name = yield from source.span(_NAME)
        yield from source.expect(SEPARATOR)
        yield from source.spaces()
        if name == KIND and (yield from source.peek()) != "{":
            name = yield from source.span(_NAME)
            yield from source.spaces()
        fenced = yield from source.literal(FENCE, FENCE_END)
        yield from source.spaces()
        yield from read_arguments(parser, name)
        parser.end_call()
        yield from source.spaces()
        if fenced:
            yield from source.literal(FENCE_END)
            yield from source.spaces()
        yield from source.literal(CALL_END)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        before, after_name, after = self.parts
        call = lark.rule(either([lark_call(lark, t, before + t.name + after_name, after) for t in tools]), "call")
        return f"{lark.text(CALLS)} {repeated(call, lark.text(self.between), parallel)} {lark.text(CALLS_END)}"

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        before, after_name, after = self.parts
        return f"{CALLS}{self.between.join(f'{before}{n}{after_name}{_json(a)}{after}' for n, a in calls)}{CALLS_END}"


class DeepSeek3(DeepSeek31):
    """V3 and R1."""

    name = "deepseek-v3"
    hints = (CALLS, SEPARATOR, FENCE)
    parts = (f"{CALL}{KIND}{SEPARATOR}", f"\n{FENCE}\n", f"\n{FENCE_END}{CALL_END}")
    between = "\n"


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)
