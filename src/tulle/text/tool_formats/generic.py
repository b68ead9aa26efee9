"""JSON without marks: an object per call, or a list of them, at the beginning of a line, also in a code fence.

For models whose chat template knows no tools, or none that is known here. What the model is told about it is written by
:func:`describe_tools`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tulle.text.tool_formats.calls import call_grammar, read_calls
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.lark import Lark, repeated
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Choice, Tool, read_tools

FENCES = ("```json", "```tool_call", "```")


class Generic(ToolFormat):
    name = "generic"

    @property
    def native(self) -> bool:
        return self.supports_tools

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        return '"name"' in template and ('"arguments"' in template or '"parameters"' in template)

    def _read_answer(self, parser: Parser) -> Reading[None]:
        source = parser.source
        while True:
            parser.content((yield from source.spaces()))
            first = yield from source.peek()
            if not first:
                return
            if first in "{[`":
                yield from parser.attempt(self._read_block(parser))
            if (yield from source.until(("\n",), parser.content)):
                parser.content(source.take(1))

    def _read_block(self, parser: Parser) -> Reading[None]:
        source = parser.source
        fence = yield from source.literal(*FENCES)
        yield from source.spaces()
        yield from read_calls(parser)
        yield from source.spaces()
        if fence:
            yield from source.literal("```")

    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        return repeated(call_grammar(lark, tools), '"\\n"', parallel)


def describe_tools(
    tools: Sequence[Mapping[str, Any] | Tool], choice: Choice = "auto", format: ToolFormat | None = None
) -> str:
    """A text for the system message that says which tools there are and how to call them.

    ``format``: how the model writes calls; None for lines of JSON.
    """
    listed = [
        json.dumps({"name": t.name, "description": t.description, "parameters": t.parameters}, ensure_ascii=False)
        for t in read_tools(tools)
    ]
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        when = f"Call the tool {function.get('name')!r} now."
    elif choice == "required":
        when = "Call at least one tool now."
    else:
        when = "Call a tool only where it helps; otherwise answer as usual."
    return "\n".join(
        [
            "You can call these tools. Each line is one tool, with a JSON Schema of its parameters:",
            *listed,
            "",
            "To call a tool, answer with nothing but one line of JSON per call:"
            if isinstance(format, Generic | None)
            else "To call a tool, answer with nothing but the call, in this form:",
            (format or Generic()).written([("the tool", {"a parameter": "its value"})]),
            when,
        ]
    )
