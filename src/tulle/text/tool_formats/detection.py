"""Which format a model writes: from its chat template, its tokens and its type."""

from __future__ import annotations

import json
from collections.abc import Collection

from tulle.text.chat_template import DEFAULT, WITH_TOOLS
from tulle.text.detokenizer import special_ids
from tulle.text.reasoning import detect_reasoning
from tulle.text.template_facts import ARGUMENTS, TOOL, template_facts
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats import gemma, harmony, llama3, mistral, python_calls, qwen3_coder
from tulle.text.tool_formats.contract import ToolFormat
from tulle.text.tool_formats.delta import Arguments, joined
from tulle.text.tool_formats.generic import Generic
from tulle.text.tool_formats.hermes import Hermes

FORMATS: tuple[type[ToolFormat], ...] = (
    Hermes,
    qwen3_coder.Qwen3Coder,
    llama3.Llama3,
    mistral.Mistral,
    mistral.MistralArgs,
    harmony.Harmony,
    gemma.FunctionGemma,
    gemma.Gemma4,
    python_calls.PythonList,
    python_calls.ToolCode,
    Generic,
)


def detect(tokenizer: ModelTokenizer, model_type: str = "") -> ToolFormat:
    """The format of a model's tool calls and reasoning. ``model_type``: of its ``config.json``.

    The template shows how the model writes calls: a format counts only where it reads the call that the template
    writes. A model whose template shows no tools, or calls in a form that is not known, gets the generic JSON format
    with ``supports_tools`` False: the tools then go into the system message.
    """
    template = tokenizer.templates.get(WITH_TOOLS) or tokenizer.templates.get(DEFAULT) or ""
    library = tokenizer.tokenizer
    tokens = {token.content: number for number, token in library.get_added_tokens_decoder().items()}
    hidden = special_ids(library)
    facts = template_facts(template, tokenizer.special)
    kind = _kind(template, tokens, model_type)

    def made(kind: type[ToolFormat], supports_tools: bool) -> ToolFormat:
        return kind(
            supports_tools=supports_tools,
            tokens=tokens,
            special=frozenset(text for text, number in tokens.items() if number in hidden),
            **({} if kind is harmony.Harmony else {"reasoning": detect_reasoning(template, tokens)}),
        )

    if kind is harmony.Harmony:
        # Channels are there with and without tools.
        return made(kind, facts.tools)
    if kind is None or not facts.tools or not _reads(made(kind, True), facts.call):
        return made(Generic, False)
    return made(kind, True)


def _reads(format: ToolFormat, call: str) -> bool:
    """Whether the format reads the call that a template writes, where it writes one."""
    parser = format.parser([TOOL], eager=False)
    deltas = joined([*parser.push(call), *parser.end()])
    found = [delta.text for delta in deltas if isinstance(delta, Arguments)]
    return not call or [json.loads(text) for text in found] == [ARGUMENTS]


def _kind(template: str, tokens: Collection[str], model_type: str) -> type[ToolFormat] | None:
    """By what the template writes before calls; the first that fits."""
    if (harmony.CHANNEL in template and harmony.MESSAGE in template) or model_type == "gpt_oss":
        return harmony.Harmony
    if qwen3_coder.FUNCTION in template and qwen3_coder.PARAMETER in template:
        return qwen3_coder.Qwen3Coder
    for kind in (gemma.FunctionGemma, gemma.Gemma4):
        if kind.start in template:
            return kind
    if mistral.CALLS in template:
        return mistral.MistralArgs if mistral.ARGS in template or mistral.ARGS in tokens else mistral.Mistral
    if "<tool_call>" in template:
        # GLM writes arguments in tags of its own.
        return None if "<arg_key>" in template else Hermes
    if python_calls.FENCE in template:
        return python_calls.ToolCode
    if llama3.TAG in template or ("ipython" in template and '"parameters"' in template):
        return llama3.Llama3
    if model_type.startswith("llama4") or "[func_name1(" in template:
        return python_calls.PythonList
    if model_type in ("llama", "mllama") and llama3.TAG in tokens:
        return llama3.Llama3
    if '"name"' in template and ('"arguments"' in template or '"parameters"' in template):
        return Generic
    return None
