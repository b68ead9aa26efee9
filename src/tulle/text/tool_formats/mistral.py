"""Mistral: ``[TOOL_CALLS]`` and a JSON list of calls; newer models write ``[TOOL_CALLS]name[ARGS]{...}`` for each."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tulle.text.tool_formats.calls import call_grammar, lark_call, read_arguments, read_calls
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, either, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Tool

CALLS, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME, _ID = re.compile(r"[^\s\[\]{}]*"), re.compile(r"[A-Za-z0-9]*")
_DIGITS = string.digits + string.ascii_letters


class Mistral(ToolFormat):
    """The JSON list; its parser reads both forms."""

    name = "mistral"
    marks = (CALLS, ARGS, ID)
    hints = (CALLS,)

    def template_id(self, id: str) -> str:
        """Nine letters and digits, which Mistral's templates want; an id that is not so is hashed."""
        if re.fullmatch(r"[A-Za-z0-9]{9}", id):
            return id
        number, digits = int.from_bytes(hashlib.sha256(id.encode("utf-8", "replace")).digest()), ""
        for _ in range(9):
            number, digit = divmod(number, 62)
            digits += _DIGITS[digit]
        return digits

    def _read_answer(self, parser: Parser) -> Reading[None]:
        while (yield from parser.source.until((CALLS,), parser.content)):
            yield from parser.attempt(self._read_block(parser))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.expect(CALLS)
        yield from source.spaces()
        if (yield from source.peek()) in ("[", "{"):
            yield from read_calls(parser)
            return
        name = yield from source.span(_NAME)
        if (yield from source.literal(ID)):
            yield from source.span(_ID)
        yield from source.literal(ARGS)
        yield from source.spaces()
        yield from read_arguments(parser, name)
        parser.end_call()

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        calls = repeated(call_grammar(lark, tools), '", "', parallel)
        return f'{lark.text(CALLS)} " "? "[" {calls} "]"'

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
        return f"{CALLS}{json.dumps(listed, ensure_ascii=False)}"


class MistralArgs(Mistral):
    """The newer form."""

    name = "mistral-args"

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        call = lark.rule(either([lark_call(lark, t, CALLS + t.name + ARGS, "") for t in tools]), "call")
        return f"{call}+" if parallel else call

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "".join(f"{CALLS}{name}{ARGS}{json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls)

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        return super().hinted(template, tokens, model_type) and (ARGS in template or ARGS in tokens)
