"""FunctionGemma and Gemma 4: ``call:name{key:value}`` between marks, with strings between quotes of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.json_text import json_value
from tulle.text.tool_formats.lark import ANY, Lark, either
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.python_calls import ordered, to_json
from tulle.text.tool_formats.source import NoMatch, Reading
from tulle.text.tool_formats.tools import Tool, allowed_values

DEPTH = 60
_NAME, _KEY = re.compile(r"[^\s{}<>]*"), re.compile(r"[^\s{}\[\]<>:,\"]*")


class FunctionGemma(ToolFormat):
    """Gemma 3's small model for calls."""

    name = "functiongemma"
    start: ClassVar[str] = "<start_function_call>"
    end: ClassVar[str] = "<end_function_call>"
    quote: ClassVar[str] = "<escape>"
    marks = (start, end, quote)
    hints = (start,)
    keys = _KEY

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((self.start,), parser.content)):
            yield from parser.attempt(self._read_call(parser))

    def _read_call(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.expect(self.start)
        yield from source.spaces()
        yield from source.expect("call:")
        name = yield from source.span(_NAME)
        if (yield from source.peek()) != "{":
            raise NoMatch
        parser.begin_call(name)
        yield from self._read_value(parser, 0)
        parser.end_call()
        yield from source.spaces()
        yield from source.literal(self.end)

    def _read_value(self, parser: Parser, depth: int) -> Reading[None]:
        """Gives a value's JSON as it comes."""
        source = parser.source
        if depth > DEPTH:
            raise NoMatch
        bracket = yield from source.literal("{", "[")
        if bracket:
            parser.arguments(bracket)
            yield from self._read_items(parser, depth, bracket)
        elif (yield from source.literal(self.quote)):
            yield from self._read_string(parser)
        else:
            yield from json_value(source, parser.arguments)

    def _read_items(self, parser: Parser, depth: int, bracket: str) -> Reading[None]:
        source = parser.source
        end = "}" if bracket == "{" else "]"
        yield from source.spaces()
        closed = bool((yield from source.literal(end)))
        while not closed:
            if bracket == "{":
                yield from self._read_key(parser)
            yield from source.spaces()
            yield from self._read_value(parser, depth + 1)
            yield from source.spaces()
            closed = (yield from source.expect(",", end)) == end
            if not closed:
                parser.arguments(", ")
                yield from source.spaces()
        parser.arguments(end)

    def _read_key(self, parser: Parser) -> Reading[None]:
        source = parser.source
        if (yield from source.literal(self.quote)):
            yield from self._read_string(parser)
        elif (yield from source.peek()) == '"':
            yield from json_value(source, parser.arguments)
        else:
            key = yield from source.span(_KEY)
            if not key:
                raise NoMatch
            parser.arguments(to_json(key))
        yield from source.spaces()
        yield from source.expect(":")
        parser.arguments(": ")

    def _read_string(self, parser: Parser) -> Reading[None]:
        parser.arguments('"')
        if not (yield from parser.source.until((self.quote,), lambda text: parser.arguments(to_json(text)[1:-1]))):
            raise NoMatch
        parser.source.take(len(self.quote))
        parser.arguments('"')

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        body = either([f"{lark.text(t.name)} {self._object_grammar(lark, t, t.parameters)}" for t in tools])
        call = lark.rule(f"{lark.text(self.start + 'call:')} {body} {lark.text(self.end)}", "call")
        return f"{call}+" if parallel else call

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "".join(f"{self.start}call:{name}{self._written(arguments)}{self.end}" for name, arguments in calls)

    def _value_grammar(self, lark: Lark, tool: Tool, schema: Any) -> str:
        """An expression for a value. Of strings, lengths and values count; of objects, properties."""
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if isinstance(reference, str):
            # Schemas may hold themselves.
            return lark.shared(
                f"{tool.name} {reference}", lambda: self._value_grammar(lark, tool, tool.resolved(schema))
            )
        found = tool.resolved(schema)
        values, kinds = allowed_values(found), found.get("type")
        if values:
            return either([lark.text(self._written(value)) for value in values])
        options = found.get("anyOf") or found.get("oneOf")
        if not options and isinstance(kinds, list):
            options = [{**found, "type": kind} for kind in kinds]
        if options:
            return either([self._value_grammar(lark, tool, option) for option in options])
        if kinds == "string" or kinds is None:
            least, most = int(found.get("minLength", 0)), found.get("maxLength")
            bounded = f"(?s:.{{{least},{'' if most is None else int(most)}}})"
            return f"{lark.text(self.quote)} {lark.before(self.quote, bounded if least or most is not None else ANY)}"
        if kinds == "array":
            item = lark.rule(self._value_grammar(lark, tool, found.get("items", {})), "item")
            least, most = int(found.get("minItems", 0)), found.get("maxItems")
            more = f"{{{max(least - 1, 0)},{'' if most is None else max(int(most) - 1, 0)}}}"
            items = f"{item} ({_COMMA} {item}){more}"
            return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'
        if kinds == "object":
            return self._object_grammar(lark, tool, found)
        return lark.json(tool.whole(found))

    def _object_grammar(self, lark: Lark, tool: Tool, schema: Mapping[str, Any]) -> str:
        def argument(name: str, part: Any) -> str:
            return f"{lark.text(name + ':')} {self._value_grammar(lark, tool, part)}"

        part = Tool("", parameters=schema)
        return f'"{{" {ordered(lark, part.properties, part.required, argument, _COMMA)} "}}"'

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{self._written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(self._written, value)) + "]"
        return json.dumps(value)


class Gemma4(FunctionGemma):
    name = "gemma4"
    start = "<|tool_call>"
    end = "<tool_call|>"
    quote = '<|"|>'
    marks = (start, end, quote)
    hints = (start,)


_COMMA = '","'
