"""Hermes and Qwen: every call is a JSON object between ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

from collections.abc import Sequence

from tulle.text.tool_formats.calls import call_grammar, read_calls
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Tool

START, END = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    name = "hermes"
    marks = (START, END)

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((START,), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.expect(START)
        yield from source.spaces()
        yield from read_calls(parser)
        yield from source.spaces()
        yield from source.literal(END)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        call = lark.rule(f"{lark.text(START)} {_NEWLINE} {call_grammar(lark, tools)} {_NEWLINE} {lark.text(END)}")
        return repeated(call, _NEWLINE, parallel)


_NEWLINE = '"\\n"'
