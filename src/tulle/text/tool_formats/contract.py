"""What a format of tool calls is: how they are written, read back and enforced."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tulle.errors import UserError
from tulle.text.reasoning import AnswerMarks, ReasoningMarks
from tulle.text.tool_formats.delta import call_id
from tulle.text.tool_formats.lark import Lark
from tulle.text.tool_formats.parser import Parser
from tulle.text.tool_formats.source import Reading
from tulle.text.tool_formats.tools import Choice, Tool, chosen_tools, read_tools


@dataclass(frozen=True)
class ToolFormat(ABC):
    """How a model writes tool calls and reasoning."""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]] = ()
    """Texts around calls that may be tokens of their own."""
    hints: ClassVar[tuple[str, ...]] = ()
    """What a chat template of such a model holds, all of it; see :meth:`hinted`."""
    keys: ClassVar[re.Pattern[str] | None] = None
    """Names of parameters that can be written; None where all can."""
    interrupts: ClassVar[tuple[str, ...]] = ()
    """Marks of calls that come in the midst of reasoning, which then is over."""

    supports_tools: bool = True
    """The chat template knows tools. Otherwise they are described in the system message: see
    :func:`tulle.text.messages.prepare_messages`."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """The tokenizer's added tokens by their text."""
    special: frozenset[str] = frozenset()
    """Which of them decoding leaves out."""
    reasoning: ReasoningMarks | None = None
    """None: the model does not reason."""
    answer: AnswerMarks | None = None
    """Marks around the answer itself; None where it stands bare."""

    @property
    def keep_special(self) -> bool:
        """Whether marks are special tokens, which the stream of text must then keep."""
        around = [mark for pair in (self.reasoning, self.answer) if pair for mark in (pair.start, pair.end)]
        return any(token in mark for token in self.special for mark in (*self.marks, *around))

    @property
    def marks_answers(self) -> bool:
        """Whether answers need the parser also without tools."""
        return self.reasoning is not None or self.answer is not None

    @property
    def native(self) -> bool:
        """Whether the model learnt this format; otherwise calls are plain text to its template."""
        return True

    @classmethod
    def hinted(cls, template: str, tokens: Collection[str], model_type: str) -> bool:
        """Whether a chat template, the tokenizer's added tokens or the model's type speak for this format."""
        return bool(cls.hints) and all(hint in template for hint in cls.hints)

    def parser(
        self,
        tools: Sequence[Mapping[str, Any] | Tool] | None = None,
        prompt: str = "",
        *,
        eager: bool = True,
        ids: Callable[[], str] = call_id,
    ) -> Parser:
        """A parser of one answer.

        ``prompt``: the rendered prompt, whose end tells whether the model already thinks. Without tools nothing is a
        call. ``eager``: see :class:`Parser`; False for answers that are not streamed.
        """
        return Parser(lambda parser: self._read(parser, prompt), read_tools(tools), eager=eager, ids=ids)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any] | Tool],
        choice: Choice = "required",
        parallel: bool = True,
        prompt: str = "",
    ) -> str:
        """A Lark grammar of llguidance, of which every text is one or more valid calls, after reasoning where there is.

        ``choice`` is ``required``, or a mapping that names a function: then exactly that call comes. Raises
        ``UserError`` for a tool that is not there, for a schema that makes no sense, and for a parameter whose name
        cannot be written in this format.
        """
        chosen = chosen_tools(read_tools(tools), choice)
        for key in (key for tool in chosen for key in tool.properties if self.keys):
            if not re.fullmatch(self.keys or "", key):
                raise UserError(
                    f"expected parameters whose names this model's calls can hold, found {key!r}; rename it"
                )
        lark = Lark(self.tokens)
        try:
            calls = self._calls(lark, chosen, parallel and not isinstance(choice, Mapping))
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"expected a JSON Schema as parameters of every tool, found one that cannot be read: {error}"
            ) from None
        return lark.start(f"{self._thoughts(lark, prompt)}{calls}")

    def before_answer(self, lark: Lark, prompt: str) -> str:
        """An expression for what comes before an answer that has a grammar of its own."""
        thoughts = self.reasoning.grammar(lark, self.reasoning.opened(prompt)) if self.reasoning else ""
        return thoughts + (self.answer.grammar(lark, prompt) if self.answer else "")

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, each a name and its arguments, as the model writes them. One at least."""
        return "\n".join(_json_line(*call) for call in calls)

    def template_id(self, id: str) -> str:
        """A call's id as the model's chat template takes it."""
        return id

    @abstractmethod
    def _read_answer(self, parser: Parser) -> Reading[None]:
        """Reads content and calls, with at least one tool."""

    @abstractmethod
    def _calls(self, lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
        """An expression for the calls."""

    def _read(self, parser: Parser, prompt: str) -> Reading[None]:
        if self.reasoning:
            interrupts = self.interrupts if parser.tools else ()
            yield from self.reasoning.read(parser.source, self.reasoning.opened(prompt), parser, interrupts)
        if self.answer:
            yield from self.answer.read(parser.source, prompt, parser)
        if parser.tools:
            yield from self._read_answer(parser)
        yield from parser.source.until((), parser.content)

    def _thoughts(self, lark: Lark, prompt: str) -> str:
        return self.reasoning.grammar(lark, self.reasoning.opened(prompt)) if self.reasoning else ""


def _json_line(name: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
