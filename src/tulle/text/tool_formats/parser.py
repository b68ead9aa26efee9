"""The parser that all formats share: what is found becomes deltas, what is no call becomes content."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tulle.text.detokenizer import overlap
from tulle.text.tool_formats.delta import Arguments, Content, Delta, Reasoning, ToolCall
from tulle.text.tool_formats.source import SPACE, Found, NoMatch, Reading, Source
from tulle.text.tool_formats.tools import Tool


class Parser:
    """Text in, deltas out, as soon as they are certain.

    However the text is cut, the joined deltas are the same. What is no valid call of one of the tools is content:
    nothing is lost but the markers, and white space next to calls and reasoning.

    ``eager``: the arguments of a call are given as they come. A call that goes wrong after its arguments began was
    given by then: its arguments do not parse, and the text goes on as content. Otherwise a call is held until it is
    whole, and one that goes wrong is content from its beginning.
    """

    def __init__(
        self,
        read: Callable[[Parser], Reading[None]],
        tools: Sequence[Tool],
        *,
        eager: bool,
        ids: Callable[[], str],
    ):
        self.source = Source()
        self.tools = {tool.name: tool for tool in tools}
        self.calls = 0
        """Calls so far."""
        self._eager, self._ids = eager, ids
        self._out: list[Delta] = []
        self._held: list[Delta] = []
        """Of a call that may still go wrong."""
        self._open = False
        """A call began and did not end."""
        self._space = ""
        """White space at the end of the content: it is content only where more content follows."""
        self._drop_space = False
        self._answer_end = ""
        """The mark that ends the answer, where one is to come."""
        self._mark = ""
        """How that mark may begin, at the end of the content."""
        self._reasoning_space = ""
        self._reasoning_begun = False
        self._reading = read(self)
        self._running = True

    def push(self, text: str) -> list[Delta]:
        """What is certain with this piece of text."""
        self.source.add(text)
        self._run()
        found, self._out = self._out, []
        return found

    def end(self) -> list[Delta]:
        """The rest, when the text is over."""
        self.source.ended = True
        self._run()
        self._end_mark()
        if self._space:
            self._out.append(Content(self._space))
            self._space = ""
        found, self._out = self._out, []
        return found

    def _run(self) -> None:
        while self._running:
            try:
                next(self._reading)
            except StopIteration:
                self._running = False
                break
            if not self.source.ended:
                break

    # What readers say.

    def begin_answer(self, end: str) -> None:
        """The answer begins, without the white space before it; its first ``end`` is not part of it."""
        self._answer_end, self._space, self._drop_space = end, "", True

    def content(self, text: str) -> None:
        if self._answer_end:
            text, self._mark = self._mark + text, ""
            before, mark, after = text.partition(self._answer_end)
            if mark:
                self._answer_end = ""
                self._content(before)
                self._space, self._drop_space = "", True
                text = after
            elif keep := overlap(text, self._answer_end):
                text, self._mark = text[:-keep], text[-keep:]
        self._content(text)

    def _end_mark(self) -> None:
        """What began as the mark is content, as something else comes now."""
        text, self._mark = self._mark, ""
        self._content(text)

    def _content(self, text: str) -> None:
        if self._drop_space:
            text = text.lstrip(SPACE)
            self._drop_space = not text
        text = self._space + text
        kept = text.rstrip(SPACE)
        self._space = text[len(kept) :]
        if kept:
            self._out.append(Content(kept))

    def reasoning(self, text: str) -> None:
        if not self._reasoning_begun:
            text = text.lstrip(SPACE)
            self._reasoning_begun = bool(text)
        text = self._reasoning_space + text
        kept = text.rstrip(SPACE)
        self._reasoning_space = text[len(kept) :]
        if kept:
            self._out.append(Reasoning(kept))

    def end_reasoning(self) -> None:
        self._reasoning_space = ""
        self._drop_space = True

    def begin_call(self, name: str) -> None:
        """A call begins. Raises ``NoMatch`` where there is no such tool."""
        if name not in self.tools:
            raise NoMatch
        self._open = True
        self._give(ToolCall(self.calls, self._ids(), name))

    def arguments(self, text: str) -> None:
        """A piece of the arguments of the call that began."""
        if text:
            self._give(Arguments(self.calls, text))

    def end_call(self) -> None:
        """The call is valid, whatever follows."""
        self._out += self._held
        self._close_call()
        self._drop_space = True

    def attempt(self, reading: Reading[Found]) -> Reading[Found | None]:
        """Reads what may be calls. Where it goes wrong, what was read of the unfinished call is content; gives None."""
        self.source.record.clear()
        self.source.recording = True
        try:
            return (yield from reading)
        except NoMatch:
            text = "".join(self.source.record)
            if self._open and self._eager:
                self._close_call()
            self._open, self._held = False, []
            self.content(text)
            return None
        finally:
            self.source.recording = False

    def _give(self, delta: Delta) -> None:
        self._end_mark()
        if self._eager:
            self._out.append(delta)
            self._space = ""
            self.source.record.clear()
        else:
            self._held.append(delta)

    def _close_call(self) -> None:
        self.calls += 1
        self._open, self._held, self._space = False, [], ""
        self.source.record.clear()
