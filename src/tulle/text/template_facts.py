"""What a chat template can render.

Templates differ in the roles they know, and in whether a call's arguments are an object or text. So a template is tried
on small conversations, and what comes out tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tulle.errors import UserError
from tulle.text.chat_template import render

KEY, VALUE, WORD = "probe_key", 'probe "value"', "probe_word"


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template can render."""

    tools: bool
    """It shows the tools."""
    system: bool
    """It shows a system message."""
    developer: bool
    """It shows a message of the role ``developer``."""
    calls: bool
    """It shows the calls of an assistant's message."""
    results: bool
    """It shows messages of the role ``tool``."""
    text_arguments: bool
    """It wants the arguments of calls as JSON text, not as an object."""


def template_facts(template: str, special: Mapping[str, str] | None = None) -> TemplateFacts:
    """Tries a template. ``special``: the model's special tokens by name."""
    return _facts(template, tuple(sorted((special or {}).items())))


@lru_cache(maxsize=16)
def _facts(template: str, special: tuple[tuple[str, str], ...]) -> TemplateFacts:
    def shown(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        try:
            return render(template, messages, tools=tools, variables=dict(special))
        except UserError:
            return ""

    user = {"role": "user", "content": "Hi"}
    tool = {
        "type": "function",
        "function": {
            "name": WORD,
            "description": "Tries.",
            "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A word."}}},
        },
    }

    def called(arguments: object) -> dict[str, Any]:
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "probe_name", "arguments": arguments}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    def history(arguments: object) -> str:
        result = {"role": "tool", "name": "probe_name", "tool_call_id": "a1b2c3d4e", "content": WORD}
        return shown([user, called(arguments), result, user], [tool])

    as_object, as_text = history({KEY: VALUE}), history(json.dumps({KEY: VALUE}))
    # An object that is written as it is shows Python's quotes; text that is written as JSON, escaped ones.
    good_object = bool(as_object) and f"'{KEY}'" not in as_object
    good_text = f'"{KEY}"' in as_text and f'\\"{KEY}' not in as_text
    system = {"role": "system", "content": WORD}
    return TemplateFacts(
        tools=WORD in shown([user], [tool]),
        system=WORD in shown([system, user]),
        developer=WORD in shown([{**system, "role": "developer"}, user]),
        calls=KEY in as_object or KEY in as_text,
        results=WORD in shown([user, called({KEY: VALUE}), {"role": "tool", "content": WORD}, user])
        or as_object.count(WORD) > shown([user, called({KEY: VALUE})], [tool]).count(WORD),
        text_arguments=good_text and not good_object,
    )
