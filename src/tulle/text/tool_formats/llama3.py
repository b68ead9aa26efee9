"""Llama 3: an answer that is a JSON object with ``name`` and ``parameters``, or follows ``<|python_tag|>``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tulle.text.tool_formats.calls import call_grammar, read_calls
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.python_calls import read_python_call
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Tool

TAG = "<|python_tag|>"


class Llama3(ToolFormat):
    """After the tag, calls may also be in Python's form: ``name.call(key="value")``."""

    name = "llama3"
    marks = (TAG,)

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        told = "ipython" in template and '"parameters"' in template
        return TAG in template or told or (model_type in ("llama", "mllama") and TAG in tokens)

    def _read_answer(self, parser: Parser) -> Reading[None]:
        source = parser.source
        parser.content((yield from source.spaces()))
        if (yield from source.peek()) in ("{", "["):
            yield from parser.attempt(read_calls(parser))
        while (yield from source.until((TAG,), parser.content)):
            yield from parser.attempt(self._read_tagged(parser))

    def _read_tagged(self, parser: Parser) -> Reading[None]:
        source = parser.source
        yield from source.expect(TAG)
        yield from source.spaces()
        if (yield from source.peek()) in ("{", "["):
            yield from read_calls(parser)
        else:
            yield from read_python_call(parser)

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        return repeated(call_grammar(lark, tools, '{"name": %s, "parameters": '), '"; "', parallel)

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        lines = ({"name": name, "parameters": arguments} for name, arguments in calls)
        return "; ".join(json.dumps(line, ensure_ascii=False) for line in lines)
