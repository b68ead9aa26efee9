"""Which format a model writes: from its chat template, its tokens and its type."""

from __future__ import annotations

import json

from tulle.text.chat_template import DEFAULT, WITH_TOOLS
from tulle.text.detokenizer import special_ids
from tulle.text.reasoning import detect_answer, detect_reasoning
from tulle.text.template_facts import ARGUMENTS, TOOL, template_facts
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats import deepseek, gemma, glm4, marked_json, mistral, python_calls, tagged
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.delta import Arguments, joined
from tulle.text.tool_formats.generic import Generic
from tulle.text.tool_formats.harmony import Harmony
from tulle.text.tool_formats.llama3 import Llama3

FORMATS: tuple[type[ToolFormat], ...] = (
    Harmony,
    tagged.SeedOss,
    tagged.Qwen3Coder,
    tagged.Glm45,
    tagged.Glm47,
    gemma.FunctionGemma,
    gemma.Gemma4,
    mistral.MistralArgs,
    mistral.Mistral,
    deepseek.DeepSeek3,
    deepseek.DeepSeek31,
    marked_json.Command,
    marked_json.Apertus,
    marked_json.Phi,
    marked_json.Granite,
    marked_json.ToolCalls,
    marked_json.Nemotron,
    python_calls.Lfm2,
    python_calls.Olmo3,
    marked_json.Hermes,
    python_calls.ToolCode,
    python_calls.PythonList,
    Llama3,
    glm4.Glm4,
    Generic,
)
"""In the order of trying: what says more of its model comes first."""


def detect(tokenizer: ModelTokenizer, model_type: str = "") -> ToolFormat:
    """The format of a model's tool calls and reasoning. ``model_type``: of its ``config.json``.

    The template shows how the model writes calls: a format counts only where it reads the call that the template
    writes. A model whose template shows calls but no tools has ``supports_tools`` False: the tools then go into the
    system message, with the way to call them. So it is where the template shows neither, or calls in a form that is
    not known, which then are generic JSON.
    """
    template = tokenizer.templates.get(WITH_TOOLS) or tokenizer.templates.get(DEFAULT) or ""
    library = tokenizer.tokenizer
    tokens = {token.content: number for number, token in library.get_added_tokens_decoder().items()}
    hidden = special_ids(library)
    facts = template_facts(template, tokenizer.special)
    special = frozenset(text for text, number in tokens.items() if number in hidden)
    reasoning, answer = detect_reasoning(template, tokens), detect_answer(template)
    shows_tools = facts.tools or facts.system_tools
    for kind in FORMATS:
        if not kind.hinted(template, tokens, model_type):
            continue
        if kind is Harmony:
            # Channels are there with and without tools.
            return Harmony(supports_tools=shows_tools, tokens=tokens, special=special)
        found = kind(shows_tools, tokens, special, reasoning, answer)
        if _reads(found, facts.call) if facts.call else shows_tools:
            return found
    return Generic(False, tokens, special, reasoning, answer)


def _reads(format: ToolFormat, call: str) -> bool:
    """Whether the format reads the call that a template writes."""
    parser = format.parser([TOOL], eager=False)
    deltas = joined([*parser.push(call), *parser.end()])
    found = [delta.text for delta in deltas if isinstance(delta, Arguments)]
    return [json.loads(text) for text in found] == [ARGUMENTS]
