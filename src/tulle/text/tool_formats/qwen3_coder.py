"""Qwen3-Coder: ``<function=name>`` with a ``<parameter=key>`` for every argument, between ``<tool_call>`` marks.

Values of parameters whose schema says string are text as it stands; others are JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.python_calls import is_json, ordered, to_json
from tulle.text.tool_formats.source import NoMatch, Reading, Source
from tulle.text.tool_formats.tools import Tool, allowed_values

START, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_NAME, _KEY = re.compile(r"[^\s<>]*"), re.compile(r"[^\n<>]*")
_WORDS = {"True": "true", "False": "false", "None": "null"}


class Qwen3Coder(ToolFormat):
    name = "qwen3-coder"
    marks = (START, END, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((START, FUNCTION), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.literal(START)
        yield from source.spaces()
        yield from source.expect(FUNCTION)
        name = yield from source.span(_NAME)
        yield from source.expect(">")
        yield from source.spaces()
        tag = yield from source.expect(PARAMETER, FUNCTION_END)
        parser.begin_call(name)
        parser.arguments("{")
        first = True
        while tag == PARAMETER:
            key = yield from source.span(_KEY)
            yield from source.expect(">")
            yield from source.literal("\n")
            parser.arguments(f"{'' if first else ', '}{to_json(key)}: ")
            first = False
            tag = yield from self._read_value(parser, parser.tools[name], key)
        parser.arguments("}")
        parser.end_call()
        yield from source.spaces()
        yield from source.literal(END)

    def _read_value(self, parser: Parser, tool: Tool, key: str) -> Reading[str]:
        """Gives a value's JSON; the tag that follows it."""
        if _is_text(tool.resolved(tool.properties.get(key))):
            parser.arguments('"')
            tag = yield from _value(parser.source, lambda text: parser.arguments(to_json(text)[1:-1]))
            parser.arguments('"')
            return tag
        pieces: list[str] = []
        tag = yield from _value(parser.source, pieces.append)
        parser.arguments(_as_json("".join(pieces)))
        return tag

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        def one(tool: Tool) -> str:
            def argument(name: str, schema: Any) -> str:
                return f"{lark.text(f'{PARAMETER}{name}>' + NEWLINE)} {_value_grammar(lark, tool, schema)}"

            head = f"{FUNCTION}{tool.name}>{NEWLINE}"
            arguments = ordered(lark, tool.properties, tool.required, argument, "")
            return f"{lark.text(head)} {arguments} {lark.text(FUNCTION_END)}"

        functions = lark.rule(either([one(tool) for tool in tools]), "function")
        call = lark.rule(f"{lark.text(START + NEWLINE)} {functions} {lark.text(NEWLINE + END)}", "call")
        return repeated(call, lark.text(NEWLINE), parallel)


NEWLINE = "\n"


def _value(source: Source, give: Callable[[str], None]) -> Reading[str]:
    """Gives a value as it stands, up to the tag that closes it; the tag after that.

    The closing tag counts only where a tag follows that may: a value may hold such tags itself.
    """
    held = ""

    def hold(text: str) -> None:
        # The last newline belongs to the closing tag.
        nonlocal held
        text = held + text
        held = "\n" if text.endswith("\n") else ""
        if text.removesuffix("\n"):
            give(text.removesuffix("\n"))

    while True:
        if not (yield from source.until((PARAMETER_END,), hold)):
            raise NoMatch
        source.take(len(PARAMETER_END))
        space = yield from source.spaces()
        tag = yield from source.literal(PARAMETER, FUNCTION_END)
        if tag:
            return tag
        hold(PARAMETER_END + space)


def _as_json(text: str) -> str:
    """A value that is not said to be a string: as JSON where it is, also in Python's words, and else a string."""
    text = text.strip()
    return text if is_json(text) else _WORDS.get(text) or to_json(text)


def _is_text(schema: Mapping[str, Any]) -> bool:
    values = allowed_values(schema)
    if "type" not in schema and values:
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def _value_grammar(lark: Lark, tool: Tool, schema: Any) -> str:
    found = tool.resolved(schema)
    end = f"{NEWLINE}{PARAMETER_END}{NEWLINE}"
    if not _is_text(found):
        return f"{lark.json(tool.whole(schema))} {lark.text(end)}"
    values = allowed_values(found)
    if values:
        return either([lark.text(f"{value}{end}") for value in values if isinstance(value, str)])
    least, most = found.get("minLength"), found.get("maxLength")
    if least is None and most is None:
        return f"{lark.before(PARAMETER_END)} {lark.text(NEWLINE)}"
    bounds = f"(?s:.{{{int(least or 0)},{'' if most is None else int(most)}}})"
    return f"{lark.before(NEWLINE + PARAMETER_END, bounds)} {lark.text(NEWLINE)}"
