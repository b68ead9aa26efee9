"""Calls as JSON objects: ``{"name": ..., "arguments": {...}}``, as most formats write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tulle.text.tool_formats.json_text import json_string, json_value
from tulle.text.tool_formats.lark import Lark, either
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import NoMatch, Reading
from tulle.text.tool_formats.tools import Tool

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")
OTHER_KEYS = ("type", "id", "index", "tool_call_id")
"""Keys that calls may also have, in the forms of several APIs."""


def object_text(parser: Parser, first: str) -> Reading[str]:
    """The text of an object; also from a string that holds one, and from null."""
    if first == "n":
        yield from parser.source.expect("null")
        return "{}"
    if first == '"':
        text = yield from json_string(parser.source)
        if not is_object(text):
            raise NoMatch
        return text
    if first != "{":
        raise NoMatch
    pieces: list[str] = []
    yield from json_value(parser.source, pieces.append)
    return "".join(pieces)


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_call(parser: Parser) -> Reading[None]:
    """One call. Raises ``NoMatch`` as soon as the object is something else."""
    source = parser.source
    yield from source.expect("{")
    name: str | None = None
    waiting: str | None = None
    begun = False
    while True:
        yield from source.spaces()
        key = yield from json_string(source)
        yield from source.spaces()
        yield from source.expect(":")
        yield from source.spaces()
        if key in NAMES and name is None:
            name = yield from json_string(source)
            if name not in parser.tools:
                raise NoMatch
            if waiting is not None:
                parser.begin_call(name)
                parser.arguments(waiting)
                begun = True
        elif key in ARGUMENTS and waiting is None and not begun:
            first = yield from source.peek()
            if name is None or first != "{":
                waiting = yield from object_text(parser, first)
            if name is not None:
                parser.begin_call(name)
                begun = True
                if waiting is not None:
                    parser.arguments(waiting)
                else:
                    yield from json_value(source, parser.arguments)
        elif key in OTHER_KEYS:
            yield from json_value(source, lambda _: None)
        else:
            raise NoMatch
        yield from source.spaces()
        if (yield from source.expect(",", "}")) == "}":
            break
    if name is None:
        raise NoMatch
    if not begun:
        parser.begin_call(name)
        parser.arguments("{}")
    parser.end_call()


def read_named_call(parser: Parser) -> Reading[None]:
    """One call whose name is the key: ``{name: {...}}``."""
    source = parser.source
    yield from source.expect("{")
    yield from source.spaces()
    name = yield from json_string(source)
    yield from source.spaces()
    yield from source.expect(":")
    yield from source.spaces()
    yield from read_arguments(parser, name)
    yield from source.spaces()
    yield from source.expect("}")
    parser.end_call()


def read_arguments(parser: Parser, name: str) -> Reading[None]:
    """The arguments of a call that begins here, as an object; the call does not end yet."""
    if (yield from parser.source.peek()) != "{":
        raise NoMatch
    parser.begin_call(name)
    yield from json_value(parser.source, parser.arguments)


def read_calls(
    parser: Parser,
    separators: tuple[str, ...] = (",", ";"),
    one: Callable[[Parser], Reading[None]] = read_call,
) -> Reading[None]:
    """One call or more, or a list of them; separated by white space or one of the ``separators``."""
    source = parser.source
    if (yield from source.literal("[")):
        yield from source.spaces()
        yield from _sequence(parser, (",",), one)
        yield from source.spaces()
        yield from source.expect("]")
    else:
        yield from _sequence(parser, separators, one)


def _sequence(parser: Parser, separators: tuple[str, ...], one: Callable[[Parser], Reading[None]]) -> Reading[None]:
    source = parser.source
    while True:
        yield from one(parser)
        yield from source.spaces()
        separator = yield from source.literal(*separators)
        if separator:
            yield from source.spaces()
        if (yield from source.peek()) != "{":
            if separator:
                raise NoMatch
            return


def call_grammar(lark: Lark, tools: Sequence[Tool], opening: str = '{"name": %s, "arguments": ', end: str = "}") -> str:
    """An expression for one call of one of the tools; ``opening`` holds the place of its name, in JSON."""
    options = [lark_call(lark, tool, opening % json.dumps(tool.name, ensure_ascii=False), end) for tool in tools]
    return lark.rule(either(options), "call")


def lark_call(lark: Lark, tool: Tool, opening: str, end: str) -> str:
    """An expression for one call: its arguments between two texts."""
    return f"{lark.text(opening)} {lark.json(arguments_schema(tool))} {lark.text(end)}"


def arguments_schema(tool: Tool) -> dict[str, object]:
    """The tool's schema, of an object."""
    return {"type": "object", **tool.parameters}
