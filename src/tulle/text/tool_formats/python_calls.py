"""Calls as Python writes them, ``name(key="value")``: in a list (Llama 4, LFM2), or a call per line (Gemma 3, OLMo 3).

Nothing is run: the text is parsed, and every value must be a literal, of Python or of JSON.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from tulle.text.tool_formats.calls import read_call, read_calls
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import NoMatch, Reading, Source
from tulle.text.tool_formats.tools import Tool

PREFIX = "default_api."
"""What Gemini's relatives put before names."""
DEPTH, LENGTH = 60, 200_000
"""Deeper or longer calls are refused."""
_NAME, _PLAIN = re.compile(r"[^\s()\[\]{}\"'=,;`]*"), re.compile(r"[^\"'\\()\[\]{}]*")
_KEYWORD, _WORD = re.compile(r"((?:^|(?<=,))\s*)([^\s,=*]+)(\s*=)"), "word_"
_KEYS = re.compile(r"[^\s,=*()\[\]{}'\"\\]*")
_IN_STRING = {quote: re.compile(rf"[^\\{quote[0]}]*") for quote in ("'", '"', "'''", '"""')}
_BROKEN = (SyntaxError, ValueError, LookupError, RecursionError, MemoryError)
"""What Python's parser raises for a text that is no expression."""
_LITERALS = (str, int, float, bool, type(None))


class PythonList(ToolFormat):
    """``[f(a=1), g()]`` as the whole answer."""

    name = "python"
    keys = _KEYS

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        return model_type.startswith("llama4") or "[func_name1(" in template

    def _read_answer(self, parser: Parser) -> Reading[None]:
        source = parser.source
        parser.content((yield from source.spaces()))
        if (yield from source.peek()) == "[":
            yield from parser.attempt(read_python_list(parser))

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        return f'"[" {repeated(python_grammar(lark, tools), _COMMA, parallel)} "]"'

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return f"[{', '.join(python_text(*call) for call in calls)}]"


class Lfm2(PythonList):
    """LFM2: the list between marks. A model that was told so writes JSON there."""

    name = "lfm2"
    start: ClassVar[str] = "<|tool_call_start|>"
    end: ClassVar[str] = "<|tool_call_end|>"
    marks = (start, end)

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        # The templates of most show the list of tools, but no calls.
        return cls.start in template or cls.start in tokens or "<|tool_list_start|>" in template

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((self.start,), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.expect(self.start)
        yield from source.spaces()
        if (yield from source.peek()) == "{":
            yield from read_calls(parser)
        else:
            yield from read_python_list(parser)
        yield from source.spaces()
        yield from source.literal(self.end)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        return f"{lark.text(self.start)} {super()._calls(lark, tools, parallel)} {lark.text(self.end)}"

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return f"{self.start}{super().written(calls)}{self.end}"


class PythonLines(ToolFormat):
    """A call per line between marks."""

    keys = _KEYS
    start: ClassVar[str]
    end: ClassVar[str]
    around: ClassVar[str] = ""
    """White space between marks and calls."""

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((self.start,), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        """Calls, each perhaps inside ``print``."""
        source = parser.source
        yield from source.expect(self.start)
        while True:
            yield from source.spaces()
            printed = yield from source.literal("print(")
            yield from read_python_call(parser)
            yield from source.spaces()
            if printed:
                yield from source.literal(")")
                yield from source.spaces()
            yield from source.literal(";")
            yield from source.spaces()
            if (yield from source.literal(self.end)) or not (yield from source.peek()):
                return

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        calls = repeated(python_grammar(lark, tools), '"\\n"', parallel)
        return f"{lark.text(self.start + self.around)} {calls} {lark.text(self.around + self.end)}"

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        lines = "\n".join(python_text(*call) for call in calls)
        return f"{self.start}{self.around}{lines}{self.around}{self.end}"


class ToolCode(PythonLines):
    """Gemma 3, where its template says so: a code block."""

    name = "tool_code"
    start, end, around = "```tool_code", "```", "\n"
    hints = (start,)


class Olmo3(PythonLines):
    """OLMo 3."""

    name = "olmo3"
    start, end = "<function_calls>", "</function_calls>"
    marks = hints = (start, end)


_COMMA = '", "'


def read_python_list(parser: Parser) -> Reading[None]:
    """A list of calls; also of JSON objects."""
    source = parser.source
    yield from source.expect("[")
    while True:
        yield from source.spaces()
        if (yield from source.peek()) == "{":
            yield from read_call(parser)
        else:
            yield from read_python_call(parser)
        yield from source.spaces()
        if (yield from source.expect(",", "]")) == "]":
            return


def read_python_call(parser: Parser) -> Reading[None]:
    """One call, which is given when it is whole."""
    name = (yield from parser.source.span(_NAME)).removeprefix(PREFIX)
    if name not in parser.tools and name.endswith(".call"):
        name = name.removesuffix(".call")
    if name not in parser.tools:
        raise NoMatch
    names: list[str] = []
    text = yield from _balanced(parser.source, names)
    arguments = _arguments(text, names, parser.tools[name])
    parser.begin_call(name)
    parser.arguments(arguments)
    parser.end_call()


def _balanced(source: Source, names: list[str]) -> Reading[str]:
    """From ( to its ), which may hold strings and brackets.

    Arguments' names go to ``names``; in the text stand words that Python takes: a tool may call one ``from``.
    """

    def word(match: re.Match[str]) -> str:
        names.append(match[2])
        return f"{match[1]}{_WORD}{len(names) - 1}{match[3]}"

    if (yield from source.peek()) != "(":
        raise NoMatch
    found, depth, length = [source.take(1)], 1, 0
    while depth:
        plain = yield from source.span(_PLAIN)
        found.append(_KEYWORD.sub(word, plain) if depth == 1 else plain)
        bracket = yield from source.literal("(", "[", "{", ")", "]", "}", *_IN_STRING)
        found.append(bracket)
        if bracket in _IN_STRING:
            found.append((yield from _string(source, bracket)))
        elif bracket:
            depth += 1 if bracket in "([{" else -1
        length += sum(map(len, found[-3:]))
        if not bracket or depth > DEPTH or length > LENGTH:
            raise NoMatch
    return "".join(found)


def _string(source: Source, quote: str) -> Reading[str]:
    """The rest of a string, with its end."""
    found = []
    while True:
        found.append((yield from source.span(_IN_STRING[quote])))
        if (yield from source.literal(quote)):
            return "".join([*found, quote])
        # A backslash and what it escapes, or one quote of three.
        first = yield from source.peek()
        if not first:
            raise NoMatch
        found.append(source.take(1))
        if first == "\\":
            if not (yield from source.peek()):
                raise NoMatch
            found.append(source.take(1))


def _arguments(text: str, words: Sequence[str], tool: Tool) -> str:
    """JSON of the arguments in brackets; those without a name are the tool's in their order."""
    whole = f"f{text}"
    try:
        call = _parsed(whole)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise NoMatch
        names = list(tool.properties)
        if len(call.args) > len(names) or any(word.arg is None for word in call.keywords):
            raise NoMatch
        named = [(words[int(str(word.arg).removeprefix(_WORD))], word.value) for word in call.keywords]
        nodes = [*zip(names, call.args, strict=False), *named]
        if len(dict(nodes)) < len(nodes):
            raise NoMatch
        written = _Written(whole)
        return _object((to_json(name), _value(node, written)) for name, node in nodes)
    except _BROKEN:
        raise NoMatch from None


def literal_json(text: str) -> str | None:
    """JSON of a literal as Python writes it; None for anything else."""
    try:
        return None if len(text) > LENGTH else _value(_parsed(text), _Written(text))
    except (NoMatch, *_BROKEN):
        return None


def _parsed(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


class _Written:
    """A text, by the places that the parser gives: ``ast.get_source_segment`` reads all of it for every node."""

    def __init__(self, text: str):
        self._text = text.encode()
        self._lines = [0, *accumulate(map(len, self._text.splitlines(keepends=True)))]

    def of(self, node: ast.expr) -> str:
        end = self._lines[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)
        return self._text[self._lines[node.lineno - 1] + node.col_offset : end].decode()


def _object(items: Iterable[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"


def _value(node: ast.expr, text: _Written) -> str:
    """JSON of a literal; as it is written where it is JSON: the languages read a few escapes differently."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return node.id
    if isinstance(node, ast.List | ast.Tuple):
        return "[" + ", ".join(_value(item, text) for item in node.elts) + "]"
    if isinstance(node, ast.Dict):
        keys = [_value(key, text) if key else "" for key in node.keys]
        if all(key.startswith('"') for key in keys):
            return _object(zip(keys, (_value(item, text) for item in node.values), strict=True))
    signed = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd)
    constant = node.operand if isinstance(node, ast.UnaryOp) and signed else node
    if isinstance(constant, ast.Constant) and type(constant.value) in ((int, float) if signed else _LITERALS):
        segment = text.of(node)
        return segment if is_json(segment) else to_json(ast.literal_eval(segment))
    raise NoMatch


def is_json(text: str) -> bool:
    """Whether the text is JSON, without the words that only Python's reader takes."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    raise ValueError(word)


def to_json(value: Any) -> str:
    """JSON text, in characters that can be written in UTF-8. Raises ``ValueError`` for numbers that JSON has not."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def python_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Python writes it, with values in JSON."""
    return f"{name}({', '.join(f'{key}={to_json(value)}' for key, value in arguments.items())})"


def python_grammar(lark: Lark, tools: Sequence[Tool]) -> str:
    """An expression for one call; the arguments come in the schema's order, each by its own schema, in JSON."""

    def one(tool: Tool) -> str:
        def argument(name: str, schema: Any) -> str:
            return f"{lark.text(name + '=')} {lark.json(tool.whole(schema))}"

        return f'{lark.text(tool.name + "(")} {ordered(lark, tool.properties, tool.required, argument, _COMMA)} ")"'

    return lark.rule(either([one(tool) for tool in tools]), "call")


def ordered(
    lark: Lark, properties: Mapping[str, Any], required: Sequence[str], write: Callable[[str, Any], str], separator: str
) -> str:
    """An expression for the properties in their order, without some of those that are not required."""
    rest, first = '""', '""'
    for name, schema in reversed(list(properties.items())):
        argument = lark.rule(write(name, schema), "argument")
        with_rest, as_first = f"{separator} {argument} {rest}", f"{argument} {rest}"
        if name not in required:
            with_rest, as_first = f"{with_rest} | {rest}", f"{as_first} | {first}"
        rest, first = lark.rule(with_rest, "rest"), lark.rule(as_first, "first")
    return first
