"""What a model thinks before it answers, and marks around the answer itself.

Both stand between marks, of which the prompt may already hold the first.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tulle.text.tool_formats.lark import Lark
    from tulle.text.tool_formats.parser import Parser
    from tulle.text.tool_formats.source import Source


@dataclass(frozen=True)
class ReasoningMarks:
    """The marks around reasoning. They count at the beginning of an answer: later they are text like any other."""

    start: str
    end: str

    def opened(self, prompt: str) -> bool:
        """Whether the prompt ends inside reasoning, as templates that force it do."""
        return prompt.rfind(self.start) > prompt.rfind(self.end) and prompt.rstrip().endswith(self.start.rstrip())

    def read(
        self, source: Source, opened: bool, parser: Parser, interrupts: tuple[str, ...] = ()
    ) -> Generator[None, None, None]:
        """Reads reasoning, if there is; up to one of the ``interrupts``, or to the end, where it is never closed."""
        if not opened:
            space = yield from source.spaces()
            if not (yield from source.literal(self.start)):
                parser.content(space)
                return
        if (yield from source.until((self.end, *interrupts), parser.reasoning)) == self.end:
            source.take(len(self.end))
        parser.end_reasoning()

    def grammar(self, lark: Lark, opened: bool) -> str:
        """An expression for what may come before the answer: reasoning and the white space after it."""
        thoughts = f"{lark.before(self.end)} {_SPACES}?"
        return f"{thoughts} " if opened else f"({lark.text(self.start)} {thoughts})? "


@dataclass(frozen=True)
class AnswerMarks:
    """The marks around an answer, which are not part of it. They count after reasoning, or where it would be."""

    start: str
    end: str

    def read(self, source: Source, prompt: str, parser: Parser) -> Generator[None, None, None]:
        """Takes the first mark; from then on the parser's content ends before the second."""
        if not prompt.rstrip().endswith(self.start):
            space = yield from source.spaces()
            if not (yield from source.literal(self.start)):
                parser.content(space)
                return
        parser.begin_answer(self.end)

    def grammar(self, lark: Lark, prompt: str) -> str:
        """An expression for the first mark, which may be left out."""
        return "" if prompt.rstrip().endswith(self.start) else f"({lark.text(self.start)} {_SPACES}?)? "


_SPACES = "/[ \\t\\r\\n]{1,4}/"
KNOWN = (
    ReasoningMarks("<think>", "</think>"),
    ReasoningMarks("[THINK]", "[/THINK]"),
    ReasoningMarks("<|channel>thought\n", "<channel|>"),
    ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningMarks("<seed:think>", "</seed:think>"),
    ReasoningMarks("<|inner_prefix|>", "<|inner_suffix|>"),
    ReasoningMarks("<thought>", "</thought>"),
    ReasoningMarks("<reasoning>", "</reasoning>"),
)
"""Of Qwen, DeepSeek and most others; Mistral; Gemma 4; Command; Seed; Apertus; EXAONE Deep; and fine-tunes."""
ANSWERS = (
    AnswerMarks("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    AnswerMarks("<|START_TEXT|>", "<|END_TEXT|>"),
    AnswerMarks("<response>", "</response>"),
    AnswerMarks("<answer>", "</answer>"),
)
"""Of Command; its newer models; Granite 3 and ERNIE where they think; and Hunyuan."""


def detect_reasoning(template: str, tokens: Collection[str]) -> ReasoningMarks | None:
    """The marks that a chat template or the tokenizer's added tokens name; None where there are none."""
    for marks in KNOWN:
        start = marks.start.rstrip()
        if (start in tokens or start.split("thought")[0] in tokens) and marks.end in tokens:
            return marks
        if marks.end in template:
            return marks
    return None


def detect_answer(template: str) -> AnswerMarks | None:
    """The marks around answers that a chat template names, both of them; None where there are none."""
    return next((marks for marks in ANSWERS if marks.start in template and marks.end in template), None)
