"""A text that comes in pieces, read by coroutines.

A reader is a generator. It asks for what comes next, and yields where the text so far does not decide. So what it finds
cannot depend on how the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from tulle.text.detokenizer import overlap

Found = TypeVar("Found")
Reading = Generator[None, None, Found]
"""Yields to wait for more text, and returns what it found."""

SPACE = " \t\r\n"
"""White space of JSON; around markers it means nothing."""


class NoMatch(Exception):
    """The text is not what the reader expects; what it took is in ``Source.record``."""


_SPACES = re.compile(r"[ \t\r\n]*")


class Source:
    """The text so far, and where its reader is."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """Characters that were taken."""
        self.ended = False
        self.record: list[str] = []
        """What was taken, while ``recording``."""
        self.recording = False

    def add(self, text: str) -> None:
        """A piece that comes."""
        self.text, self.at = self.text[self.at :] + text, 0

    @property
    def empty(self) -> bool:
        return self.at == len(self.text)

    def take(self, count: int) -> str:
        """The next characters, which are there."""
        taken = self.text[self.at : self.at + count]
        self.at += len(taken)
        if self.recording:
            self.record.append(taken)
        return taken

    def peek(self) -> Reading[str]:
        """The next character, without taking it; '' at the end."""
        while self.empty and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def span(self, pattern: re.Pattern[str]) -> Reading[str]:
        """The characters of a class, such as ``[a-z]*``, none or more."""
        found = ""
        while True:
            end = pattern.match(self.text, self.at).end()  # type: ignore[union-attr]
            found += self.take(end - self.at)
            if not self.empty or self.ended:
                return found
            yield

    def spaces(self) -> Reading[str]:
        """White space, none or more."""
        return (yield from self.span(_SPACES))

    def literal(self, *options: str) -> Reading[str]:
        """Takes the longest of the options that comes next; '' where none does."""
        longest = max(map(len, options))
        while True:
            coming = self.text[self.at : self.at + longest]
            if self.ended or not any(o.startswith(coming) and len(o) > len(coming) for o in options):
                return self.take(max((len(o) for o in options if coming.startswith(o)), default=0))
            yield

    def expect(self, *options: str) -> Reading[str]:
        """As :meth:`literal`; raises :class:`NoMatch` where none comes."""
        found = yield from self.literal(*options)
        if not found:
            raise NoMatch
        return found

    def until(self, markers: tuple[str, ...], give: Callable[[str], None]) -> Reading[str]:
        """Gives the text before the first marker, which is returned and not taken; '' at the end of the text.

        No marker may be part of another.
        """
        longest = max(map(len, markers), default=0)
        while True:
            places = [(place, m) for m in markers if (place := self.text.find(m, self.at)) >= 0]
            if places:
                place, marker = min(places)
                give(self.take(place - self.at))
                return marker
            tail = self.text[max(self.at, len(self.text) - longest) :]
            keep = 0 if self.ended else max((overlap(tail, m) for m in markers), default=0)
            give(self.take(len(self.text) - keep - self.at))
            if self.ended:
                return ""
            yield
