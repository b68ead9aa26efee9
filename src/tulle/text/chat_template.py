"""Chat templates: a conversation to a prompt, rendered as transformers' ``apply_chat_template`` does.

A template comes with a model that somebody else made. So it runs in Jinja's sandbox, sees nothing but plain JSON
values, and can store nothing under a name that begins with an underscore.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from tulle.errors import UserError

DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of the template that is used without another word, and with tools where there is one."""
XML_TOOLS = "xml_tools"
"""What SmolLM3's template reads instead of ``tools``: a line of JSON for each."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning; the first is the one that templates read."""


def chosen_template(templates: Mapping[str, str], name: str | None, tools: Sequence[Any] | None) -> str:
    """The template called ``name``, or the one for a conversation with or without tools.

    Raises ``UserError`` where there is none.
    """
    if not templates:
        raise UserError(
            "expected a model with a chat template, found none in tokenizer_config.json or chat_template.jinja; "
            "use tulle generate"
        )
    if name is None:
        name = WITH_TOOLS if tools is not None and WITH_TOOLS in templates else DEFAULT
    if name not in templates:
        known = ", ".join(sorted(templates))
        raise UserError(f"expected a chat template called {name!r}, found {known}; choose one of these")
    return templates[name]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt for a conversation.

    ``messages`` have a ``role`` and a ``content``; keys whose value is None are left out. ``variables`` are the special
    tokens and whatever else a template asks for. Raises ``UserError`` for a template that cannot be filled in.
    """
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(
            messages=[_message(message) for message in messages],
            tools=_plain(tools),
            documents=_plain(documents),
            add_generation_prompt=add_generation_prompt,
            **({XML_TOOLS: [json.dumps(tool.get("function", tool)) for tool in tools]} if tools else {})
            | {name: _plain(value) for name, value in (variables or {}).items()},
        )
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"expected a chat template that can be filled in, found: {line}") from None


@lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset[str]:
    """Names that a template reads and does not set by itself, such as ``enable_thinking``; none of a broken one."""
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables

    try:
        return frozenset(find_undeclared_variables(_compiled("").environment.parse(template)))
    except (TemplateError, RecursionError):
        return frozenset()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in REASONING if key in found), None)
    # gpt-oss reads "thinking", everybody else "reasoning_content".
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value rebuilt of JSON's types: other objects have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from jinja2 import nodes, utils
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant said; for a prompt it is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(utils.Namespace):
        """Jinja's, without names that begin with an underscore."""

        def __init__(*args: Any, **attributes: Any) -> None:
            # `self` stays free to be an attribute, as in Jinja's own.
            own, rest = args[0], args[1:]
            found = dict(*rest, **attributes)
            for name in found:
                _refuse_underscore(name)
            utils.Namespace.__init__(own, found)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            utils.Namespace.__setitem__(self, name, value)

    def _refuse_underscore(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace with the attribute {name!r}")

    class Dictionary:
        """``dict`` as a template may call it, without its attributes."""

        def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
            return dict(*args, **items)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes the characters of HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment.from_string(template)
