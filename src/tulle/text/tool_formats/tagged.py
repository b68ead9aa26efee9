"""Calls as tags, with a pair of tags for every argument: Qwen3-Coder and its relatives, Seed-OSS, GLM-4.5.

Values of parameters whose schema says string are text as it stands; others are JSON, as far as their schema allows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.python_calls import is_json, literal_json, ordered, to_json
from tulle.text.tool_formats.source import NoMatch, Reading, Source
from tulle.text.tool_formats.tools import Tool, allowed_values

_NAME, _KEY = re.compile(r"[^\s<>]*"), re.compile(r"[^\n<>]*")
_PYTHON = re.compile(r"[\[{]|(True|False|None)\Z")


class Tagged(ToolFormat):
    """``START HEAD name NAME_END``, for every argument ``KEY key KEY_END value VALUE_END``, then ``TAIL END``.

    White space between the tags means nothing.
    """

    keys = _KEY
    start: ClassVar[str]
    end: ClassVar[str]
    head: ClassVar[str] = ""
    name_end: ClassVar[str] = ""
    key: ClassVar[str]
    key_end: ClassVar[tuple[str, ...]]
    """One tag or more."""
    value_end: ClassVar[str]
    tail: ClassVar[str] = ""
    newline: ClassVar[str] = "\n"
    """What the model writes between tags."""
    around_value: ClassVar[str] = ""
    """What it writes around a value, which is no part of it."""

    def _read_answer(self, parser: Parser) -> Reading[None]:
        # The start is left out by some models, where a head follows.
        starts = (self.start, self.head) if self.head else (self.start,)
        while (yield from parser.source.until(starts, parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        last = self.tail or self.end
        yield from source.literal(self.start)
        yield from source.spaces()
        if self.head:
            yield from source.expect(self.head)
        name = yield from source.span(_NAME)
        if self.name_end:
            yield from source.expect(self.name_end)
        yield from source.spaces()
        tag = yield from source.expect(self.key, last)
        parser.begin_call(name)
        parser.arguments("{")
        first = True
        while tag == self.key:
            key = yield from source.span(_KEY)
            for part in self.key_end:
                yield from source.spaces()
                yield from source.expect(part)
            parser.arguments(f"{'' if first else ', '}{to_json(key.strip())}: ")
            first = False
            tag = yield from self._read_value(parser, parser.tools[name], key.strip())
        parser.arguments("}")
        parser.end_call()
        if self.tail:
            yield from source.spaces()
            yield from source.literal(self.end)

    def _read_value(self, parser: Parser, tool: Tool, key: str) -> Reading[str]:
        """Gives a value's JSON; the tag that follows it."""
        edge = self.around_value
        if edge:
            yield from parser.source.literal(edge)
        schema = tool.resolved(tool.properties.get(key))
        ends = (edge, self.value_end, self.key, self.tail or self.end)
        if _is_text(schema):
            parser.arguments('"')
            tag = yield from _value(parser.source, *ends, lambda text: parser.arguments(to_json(text)[1:-1]))
            parser.arguments('"')
            return tag
        pieces: list[str] = []
        tag = yield from _value(parser.source, *ends, pieces.append)
        parser.arguments(_as_json("".join(pieces), _kinds(tool, schema)))
        return tag

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        def one(tool: Tool) -> str:
            def argument(name: str, schema: Any) -> str:
                return f"{lark.text(self._before_value(name))} {self._value_grammar(lark, tool, schema)}"

            arguments = ordered(lark, tool.properties, tool.required, argument, "")
            return f"{lark.text(self._before(tool.name))} {arguments}"

        functions = lark.rule(either([one(tool) for tool in tools]), "function")
        call = lark.rule(f"{functions} {lark.text(self._after)}", "call")
        return repeated(call, lark.text("\n"), parallel)

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(
            "".join([self._before(name), *(self._argument(*item) for item in arguments.items()), self._after])
            for name, arguments in calls
        )

    def _argument(self, name: str, value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return f"{self._before_value(name)}{text}{self._after_value}"

    def _before(self, name: str) -> str:
        start = f"{self.start}{self.newline}" if self.head else self.start
        return f"{start}{self.head}{name}{self.name_end}{self.newline}"

    def _before_value(self, name: str) -> str:
        return f"{self.key}{name}{self.newline.join(self.key_end)}{self.around_value}"

    @property
    def _after_value(self) -> str:
        return f"{self.around_value}{self.value_end}{self.newline}"

    @property
    def _after(self) -> str:
        return f"{self.tail}{self.newline}{self.end}" if self.tail else self.end

    def _value_grammar(self, lark: Lark, tool: Tool, schema: Any) -> str:
        found = tool.resolved(schema)
        end = self._after_value
        if not _is_text(found):
            return f"{lark.json(tool.whole(schema))} {lark.text(end)}"
        values = allowed_values(found)
        if values:
            return either([lark.text(f"{value}{end}") for value in values if isinstance(value, str)])
        after = lark.text(self.newline)
        least, most = found.get("minLength"), found.get("maxLength")
        if least is None and most is None:
            return f"{lark.before(self.value_end)} {after}"
        bounds = f"(?s:.{{{int(least or 0)},{'' if most is None else int(most)}}})"
        return f"{lark.before(self.around_value + self.value_end, bounds)} {after}"


class Qwen3Coder(Tagged):
    """Also Qwen3.5, Nemotron 3 and Step."""

    name = "qwen3-coder"
    start, end = "<tool_call>", "</tool_call>"
    head, name_end, tail = "<function=", ">", "</function>"
    key, key_end, value_end = "<parameter=", (">",), "</parameter>"
    around_value = "\n"
    marks = (start, end, head, tail, key, value_end)
    hints: ClassVar[tuple[str, ...]] = (head, key)


class SeedOss(Qwen3Coder):
    """Qwen3-Coder's with other outer tags."""

    name = "seed-oss"
    start, end = "<seed:tool_call>", "</seed:tool_call>"
    around_value = ""
    marks = (start, end, *Qwen3Coder.marks[2:])
    hints = (start,)


class Glm45(Tagged):
    """GLM-4.5 and 4.6."""

    name = "glm4.5"
    start, end = "<tool_call>", "</tool_call>"
    key, key_end, value_end = "<arg_key>", ("</arg_key>", "<arg_value>"), "</arg_value>"
    marks = (start, end, key, *key_end, value_end)
    hints = (start, f"\n{key}")


class Glm47(Glm45):
    """GLM-4.7 and 5: without newlines."""

    name = "glm4.7"
    newline = ""
    hints = (Glm45.start, Glm45.key)


def _value(source: Source, edge: str, value_end: str, key: str, last: str, give: Callable[[str], None]) -> Reading[str]:
    """Gives a value as it stands, up to the tag that closes it, without the ``edge`` before that; the tag after that.

    The closing tag counts only where a tag follows that may: a value may hold such tags itself.
    """
    held = ""

    def hold(text: str) -> None:
        nonlocal held
        text = held + text
        held = edge if text.endswith(edge) else ""
        if text.removesuffix(held):
            give(text.removesuffix(held))

    while True:
        if not (yield from source.until((value_end,), hold)):
            raise NoMatch
        source.take(len(value_end))
        space = yield from source.spaces()
        tag = yield from source.literal(key, last)
        if tag:
            return tag
        hold(value_end + space)


def _as_json(text: str, kinds: Collection[str]) -> str:
    """A value that is not said to be a string: as JSON where it is, also as Python has it, and else a string.

    ``kinds``: the types that its schema allows; none where it allows all. A value of another kind stays a string where
    strings are allowed.
    """
    stripped = text.strip()
    found = stripped if is_json(stripped) else literal_json(stripped) if _PYTHON.match(stripped) else None
    if found is None or ("string" in kinds and not _of_kind(json.loads(found), kinds)):
        return to_json(text if "string" in kinds else stripped)
    return found


def _of_kind(value: object, kinds: Collection[str]) -> bool:
    """Whether a value that JSON gave has one of the types."""
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean") in kinds
    if isinstance(value, int | float):
        return "number" in kinds or (isinstance(value, int) and "integer" in kinds)
    return ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object") in kinds


def _kinds(tool: Tool, schema: Mapping[str, Any], depth: int = 4) -> set[str]:
    """The types that a schema allows, as far as it says so; none where it does not say."""
    named = schema.get("type")
    if isinstance(named, str | list):
        return {named} if isinstance(named, str) else {str(kind) for kind in named}
    options = schema.get("anyOf") or schema.get("oneOf")
    parts = [_kinds(tool, tool.resolved(part), depth - 1) for part in _list(options) if depth]
    return set().union(*parts) if parts and all(parts) else set()


def _list(found: object) -> list[Any]:
    return found if isinstance(found, list) else []


def _is_text(schema: Mapping[str, Any]) -> bool:
    values = allowed_values(schema)
    if "type" not in schema and values:
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"
