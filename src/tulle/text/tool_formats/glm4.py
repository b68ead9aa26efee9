"""GLM-4: a call is the whole answer, a line with the name and the JSON of its arguments after it, without marks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tulle.text.tool_formats.calls import lark_call, read_arguments
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Tool

_NAME = re.compile(r"[^\s{}<>|]*")


class Glm4(ToolFormat):
    name = "glm4"
    hints = ("<|observation|>",)

    def _read_answer(self, parser: Parser) -> Reading[None]:
        source = parser.source
        parser.content((yield from source.spaces()))
        while (yield from source.peek()) and (yield from parser.attempt(self._read_call(parser))):
            yield from source.spaces()

    def _read_call(self, parser: Parser) -> Reading[bool]:
        name = yield from parser.source.span(_NAME)
        yield from parser.source.spaces()
        yield from read_arguments(parser, name)
        parser.end_call()
        return True

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        call = lark.rule(either([lark_call(lark, tool, f"{tool.name}\n", "") for tool in tools]), "call")
        return repeated(call, '"\\n"', parallel)

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(f"{name}\n{json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls)
