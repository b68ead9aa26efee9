"""What a parser finds in a model's text, piece by piece."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, replace

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call begins; its arguments follow."""

    index: int
    """Number of the call in this answer, from 0."""
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCall | Arguments


def call_id() -> str:
    """A new call's id: ``call_`` and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbouring pieces of one kind put together."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + delta.text)
        elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, Arguments) and isinstance(last, Arguments) and delta.index == last.index:
            found[-1] = replace(last, text=last.text + delta.text)
        else:
            found.append(delta)
    return found
