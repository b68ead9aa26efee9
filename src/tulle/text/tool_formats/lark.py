"""Grammars in llguidance's dialect of Lark: text, special tokens by number, JSON by schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as Python's ``json`` and the templates' ``tojson`` write it."""
ANY = "(?s:.*)"
"""A pattern of any text."""


class Lark:
    """Writes rules. Added tokens of the tokenizer are single tokens: text that spells one names its number."""

    def __init__(self, tokens: Mapping[str, int]):
        self._tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first))) if tokens else None
        self._rules: dict[str, str] = {}
        self._shared: dict[str, str] = {}

    def text(self, text: str) -> str:
        """An expression for exactly this text."""
        parts, at = [], 0
        for match in self._split.finditer(text) if self._split else ():
            parts += [_quoted(text[at : match.start()]), f"<[{self._tokens[match[0]]}]>"]
            at = match.end()
        return " ".join(part for part in [*parts, _quoted(text[at:])] if part) or '""'

    def json(self, schema: Any) -> str:
        """An expression for JSON that the schema allows."""
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": JSON_STYLE}
        return f"%json {json.dumps(schema)}"

    def rule(self, body: str, hint: str = "r", options: str = "") -> str:
        """A new rule; its name."""
        name = f"{hint}{len(self._rules)}"
        self._rules[name + options] = body
        return name

    def shared(self, key: str, write: Callable[[], str]) -> str:
        """The one rule of this key, which may lead to itself; ``write`` gives its body."""
        if key not in self._shared:
            self._shared[key] = name = self.rule("", "shared")
            self._rules[name] = write()
        return self._shared[key]

    def before(self, marker: str, pattern: str = ANY) -> str:
        """An expression for text up to the first ``marker``, which is part of it. A token may end the marker."""
        token = next((text for text in self._tokens if marker.endswith(text)), "")
        if token:
            return f"/{pattern}{_escaped(marker.removesuffix(token))}/ <[{self._tokens[token]}]>"
        return self.rule(f"/{pattern}/", "before", f"[suffix={_quoted(marker)}]")

    def start(self, body: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {body}", *(f"{name}: {rule}" for name, rule in self._rules.items())]) + "\n"


def either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else "(" + " | ".join(options) + ")"


def repeated(call: str, separator: str, parallel: bool) -> str:
    """One call, or with ``parallel`` one and more."""
    return f"{call} ({separator} {call})*" if parallel else call


def _escaped(text: str) -> str:
    return re.escape(text).replace("\n", "n").replace("/", "\\/")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
