"""Calls as JSON between marks: Hermes and Qwen, Granite, Phi, Hunyuan, Nemotron, Command, Apertus.

They differ in the marks, in whether a block holds one call or a list, and in the keys. Their readers take both a call
and a list, and a block that ends without its mark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tulle.text.tool_formats.calls import call_grammar, read_call, read_calls, read_named_call
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Tool


class MarkedJson(ToolFormat):
    """A list of calls between two marks."""

    start: ClassVar[str]
    end: ClassVar[str]
    opening: ClassVar[str] = '{"name": %s, "arguments": '
    """What a call is before its arguments; its name stands in it."""
    others: ClassVar[tuple[str, ...]] = ()
    """Other marks that a model may begin with."""
    around: ClassVar[tuple[str, str, str]] = ("[", ", ", "]")
    """What is before, between and after calls."""

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((self.start, *self.others), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.expect(self.start, *self.others)
        yield from source.spaces()
        yield from read_calls(parser, one=self._read_one)
        yield from source.spaces()
        yield from source.literal(self.end)

    def _read_one(self, parser: Parser) -> Reading[None]:
        return read_call(parser)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        before, between, after = self.around
        calls = repeated(self._call(lark, tools), lark.text(between), parallel)
        return f"{lark.text(self.start + before)} {calls} {lark.text(after + self.end)}"

    def _call(self, lark: Lark, tools: Sequence[Tool]) -> str:
        return call_grammar(lark, tools, self.opening)

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        before, between, after = self.around
        return f"{self.start}{before}{between.join(self._object(*call) for call in calls)}{after}{self.end}"

    def _object(self, name: str, arguments: Mapping[str, Any]) -> str:
        opening = self.opening % json.dumps(name, ensure_ascii=False)
        return f"{opening}{json.dumps(arguments, ensure_ascii=False)}}}"


class Hermes(MarkedJson):
    """Also Qwen, SmolLM3, EXAONE 4, Granite 4 and ERNIE 4.5: a block per call, on lines of its own."""

    name = "hermes"
    start, end = "<tool_call>", "</tool_call>"
    marks = (start, end)
    hints = (start,)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        call = f'{lark.text(self.start)} "\\n" {call_grammar(lark, tools)} "\\n" {lark.text(self.end)}'
        return repeated(lark.rule(call), '"\\n"', parallel)

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(f"{self.start}\n{self._object(*call)}\n{self.end}" for call in calls)


class Granite(MarkedJson):
    """Granite 3. The answer ends after the list."""

    name = "granite"
    start, end = "<|tool_call|>", ""
    others = ("<tool_call>",)
    marks = hints = (start,)


class Phi(MarkedJson):
    """Phi-4-mini."""

    name = "phi"
    start, end = "<|tool_call|>", "<|/tool_call|>"
    others = ("functools",)
    marks = (start, end)
    hints = ("<|tool|>", "<|/tool|>")


class ToolCalls(MarkedJson):
    """Hunyuan and Apriel."""

    name = "tool-calls"
    start, end = "<tool_calls>", "</tool_calls>"
    marks = hints = (start, end)


class Nemotron(MarkedJson):
    """Nemotron Nano."""

    name = "nemotron"
    start, end = "<TOOLCALL>", "</TOOLCALL>"
    marks = hints = (start, end)


class Command(MarkedJson):
    """Command R7B and Command A. The model numbers its calls, which the API's ids do not follow."""

    name = "command"
    start, end = "<|START_ACTION|>", "<|END_ACTION|>"
    opening = '", "tool_name": %s, "parameters": '
    around = ("[\n    ", ",\n    ", "\n]")
    marks = hints = (start, end)
    interrupts = (start,)

    def _call(self, lark: Lark, tools: Sequence[Tool]) -> str:
        return lark.rule(f"{lark.text(NUMBER)} /[0-9]{{1,2}}/ {super()._call(lark, tools)}", "numbered")

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        before, between, after = self.around
        numbered = (f"{NUMBER}{number}{self._object(*call)}" for number, call in enumerate(calls))
        return f"{self.start}{before}{between.join(numbered)}{after}{self.end}"


NUMBER = '{"tool_call_id": "'


class Apertus(MarkedJson):
    """The name is the key of the arguments. Calls may come in the midst of reasoning."""

    name = "apertus"
    start, end = "<|tools_prefix|>", "<|tools_suffix|>"
    opening = "{%s: "
    marks = hints = (start, end)
    interrupts = (start,)

    def _read_one(self, parser: Parser) -> Reading[None]:
        return read_named_call(parser)
