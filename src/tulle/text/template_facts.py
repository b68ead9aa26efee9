"""What a chat template can render.

Templates differ in the roles they know, and in whether a call's arguments are an object or text. So a template is tried
on small conversations, and what comes out tells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tulle.errors import UserError
from tulle.text.chat_template import render

NAME, RESULT = "probe_name", "probe_result"
ARGUMENTS = {"probe_key": 'probe "value"'}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Tries.",
        "parameters": {"type": "object", "properties": {"other_key": {"type": "string", "description": "A word."}}},
    },
}
"""What templates are tried with."""


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template can render."""

    tools: bool
    """It shows the tools."""
    system: bool
    """It shows a system message."""
    developer: bool
    """It shows a message of the role ``developer``."""
    call: str
    """What it writes for a call of :data:`TOOL` with :data:`ARGUMENTS`, which is what the model learnt to write; ''
    where it shows no calls."""
    results: bool
    """It shows messages of the role ``tool``."""
    text_arguments: bool
    """It wants the arguments of calls as JSON text, not as an object."""
    system_tools: bool
    """It shows tools only where the system message has them, as JSON text under ``tools``."""


def template_facts(template: str, special: Mapping[str, str] | None = None) -> TemplateFacts:
    """Tries a template. ``special``: the model's special tokens by name."""
    return _facts(template, tuple(sorted((special or {}).items())))


@lru_cache(maxsize=16)
def _facts(template: str, special: tuple[tuple[str, str], ...]) -> TemplateFacts:
    def shown(messages: Sequence[Mapping[str, Any]], tools: bool = False, prompt: bool = True) -> str:
        try:
            return render(
                template,
                messages,
                tools=[TOOL] if tools else None,
                add_generation_prompt=prompt,
                variables=dict(special),
            )
        except UserError:
            return ""

    user = {"role": "user", "content": "Hi"}

    def called(arguments: object) -> dict[str, Any]:
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": NAME, "arguments": arguments}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    def history(arguments: object) -> str:
        result = {"role": "tool", "name": NAME, "tool_call_id": "a1b2c3d4e", "content": RESULT}
        return shown([user, called(arguments), result], tools=True)

    text = json.dumps(ARGUMENTS)
    (key,) = ARGUMENTS
    as_object, as_text = history(ARGUMENTS), history(text)
    # An object that is written as it is shows Python's quotes; text that is written as JSON, escaped ones.
    good_object = bool(as_object) and f"'{key}'" not in as_object
    good_text = f'"{key}"' in as_text and f'\\"{key}' not in as_text
    wants_text = good_text and not good_object
    before = shown([user], tools=True)
    after = shown([user, called(text if wants_text else ARGUMENTS)], tools=True, prompt=False)
    # Some begin the answer otherwise than the history shows it, such as with reasoning.
    known = before if after.startswith(before) else shown([user], tools=True, prompt=False)
    call = after[len(os.path.commonprefix([known, after])) :]
    system = {"role": "system", "content": RESULT}
    tools = NAME in before
    return TemplateFacts(
        tools=tools,
        system=RESULT in shown([system, user]),
        developer=RESULT in shown([{**system, "role": "developer"}, user]),
        call=call if key in call else "",
        results=RESULT in as_object or RESULT in as_text,
        text_arguments=wants_text,
        system_tools=not tools and NAME in shown([{**system, "tools": json.dumps([TOOL["function"]])}, user]),
    )
