"""JSON that comes in pieces: checked strictly, given on as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tulle.text.tool_formats.source import SPACE, NoMatch, Reading, Source

DEPTH, DIGITS = 200, 4000
"""Deeper values and longer numbers are refused: Python's own reader fails on them."""
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
# What follows in a number: (state, kind of character) -> state. A number may end in the states of _COMPLETE.
_NUMBER = {
    ("minus", "0"): "zero",
    ("minus", "1"): "digits",
    ("zero", "."): "point",
    ("zero", "e"): "exponent",
    ("digits", "0"): "digits",
    ("digits", "1"): "digits",
    ("digits", "."): "point",
    ("digits", "e"): "exponent",
    ("point", "0"): "fraction",
    ("point", "1"): "fraction",
    ("fraction", "0"): "fraction",
    ("fraction", "1"): "fraction",
    ("fraction", "e"): "exponent",
    ("exponent", "+"): "sign",
    ("exponent", "-"): "sign",
    ("exponent", "0"): "power",
    ("exponent", "1"): "power",
    ("sign", "0"): "power",
    ("sign", "1"): "power",
    ("power", "0"): "power",
    ("power", "1"): "power",
}
_COMPLETE = ("zero", "digits", "fraction", "power")


class JsonScanner:
    """Says how far a text goes on as one JSON value (RFC 8259), character by character."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._expects = "value"
        """value, first value (or ]), key, first key (or }), colon, after (comma or the end), string, escape, hex, word,
        number."""
        self._stack: list[str] = []
        self._key = False
        self._count = 0
        self._word = ""
        self._number = ""

    def scan(self, text: str, at: int = 0) -> int:
        """Up to where the characters from ``at`` belong to the value; not the end where it is done or has failed."""
        while at < len(text) and not self.done:
            if self._expects == "string":
                at = _PLAIN.match(text, at).end()  # type: ignore[union-attr]
                if at == len(text):
                    break
            if self._expects == "number" and self._number_goes_on(text[at]):
                at += 1
                continue
            if self.done:
                break
            if not self._step(text[at]):
                self.failed = True
                break
            at += 1
        return at

    def finish(self) -> bool:
        """Whether the value is complete where the text ends."""
        self.done = self.done or (self._expects == "number" and not self._stack and self._number in _COMPLETE)
        return self.done

    def _step(self, c: str) -> bool:
        expects = self._expects
        if expects == "string":
            if c == '"':
                if self._key:
                    self._expects = "colon"
                else:
                    self._end_value()
            elif c == "\\":
                self._expects = "escape"
            else:
                return False
            return True
        if expects == "escape":
            if c == "u":
                self._expects, self._count = "hex", 4
                return True
            self._expects = "string"
            return c in '"\\/bfnrt'
        if expects == "hex":
            self._count -= 1
            if not self._count:
                self._expects = "string"
            return c in "0123456789abcdefABCDEF"
        if expects == "word":
            if c != self._word[0]:
                return False
            self._word = self._word[1:]
            if not self._word:
                self._end_value()
            return True
        if c in SPACE:
            return expects != "number"
        if expects in ("value", "first value"):
            if c == "]" and expects == "first value":
                return self._close("[")
            return self._begin_value(c)
        if expects in ("key", "first key"):
            if c == "}" and expects == "first key":
                return self._close("{")
            self._key, self._expects = True, "string"
            return c == '"'
        if expects == "colon":
            self._expects = "value"
            return c == ":"
        if expects == "after":
            if c == ",":
                self._expects = "key" if self._stack[-1] == "{" else "value"
                return True
            return c in "]}" and self._close("[" if c == "]" else "{")
        return False

    def _begin_value(self, c: str) -> bool:
        if c in "{[":
            self._stack.append(c)
            self._expects = "first key" if c == "{" else "first value"
            return len(self._stack) <= DEPTH
        if c == '"':
            self._key, self._expects = False, "string"
            return True
        if c in _WORDS:
            self._expects, self._word = "word", _WORDS[c]
            return True
        if c == "-" or c in "0123456789":
            self._expects, self._count = "number", 1
            self._number = {"-": "minus", "0": "zero"}.get(c, "digits")
            return True
        return False

    def _number_goes_on(self, c: str) -> bool:
        kind = "1" if c in "123456789" else "e" if c in "eE" else c
        following = _NUMBER.get((self._number, kind))
        if following and self._count < DIGITS:
            self._number, self._count = following, self._count + 1
            return True
        if self._number in _COMPLETE and kind not in ("0", "1", ".", "e"):
            self._end_value()
        return False

    def _close(self, opened: str) -> bool:
        if not self._stack or self._stack.pop() != opened:
            return False
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._expects = "after"
        self.done = not self._stack


def json_value(source: Source, give: Callable[[str], None]) -> Reading[None]:
    """Gives one JSON value as it comes; what was given is always how some JSON begins.

    Raises ``NoMatch`` where it goes wrong, after the characters before were given.
    """
    scanner = JsonScanner()
    while True:
        yield from source.peek()
        taken = source.take(scanner.scan(source.text, source.at) - source.at)
        if taken:
            give(taken)
        if scanner.done or (source.ended and source.empty and scanner.finish()):
            return
        if scanner.failed or source.ended:
            raise NoMatch


def json_string(source: Source) -> Reading[str]:
    """The characters of a JSON string."""
    if (yield from source.peek()) != '"':
        raise NoMatch
    pieces: list[str] = []
    yield from json_value(source, pieces.append)
    return str(json.loads("".join(pieces)))
