"""Which format a model writes: from its chat template, its tokens and its type."""

from __future__ import annotations

from tulle.text.chat_template import DEFAULT, WITH_TOOLS
from tulle.text.detokenizer import special_ids
from tulle.text.reasoning import detect_reasoning
from tulle.text.template_facts import template_facts
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.generic import Generic
from tulle.text.tool_formats.hermes import Hermes


def detect(tokenizer: ModelTokenizer, model_type: str = "") -> ToolFormat:
    """The format of a model's tool calls and reasoning. ``model_type``: of its ``config.json``.

    A model whose template has no tools, or tools in a form that is not known, gets the generic JSON format with
    ``supports_tools`` False.
    """
    template = tokenizer.templates.get(WITH_TOOLS) or tokenizer.templates.get(DEFAULT) or ""
    library = tokenizer.tokenizer
    tokens = {token.content: number for number, token in library.get_added_tokens_decoder().items()}
    hidden = special_ids(library)
    shows_tools = bool(template) and template_facts(template, tokenizer.special).tools
    kind = _kind(template, frozenset(tokens), model_type) if shows_tools else None
    return (kind or Generic)(
        supports_tools=kind is not None,
        tokens=tokens,
        special=frozenset(text for text, number in tokens.items() if number in hidden),
        reasoning=detect_reasoning(template, tokens),
    )


def _kind(template: str, tokens: frozenset[str], model_type: str) -> type[ToolFormat] | None:
    if "<tool_call>" in template:
        return Hermes
    return None
