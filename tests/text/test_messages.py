"""Conversations with tools through chat templates in each family's style; transformers renders them for comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tool_samples import TOOLS, byte_tokenizer, format_named
from transformers import AutoTokenizer

from tulle.errors import UserError
from tulle.text.messages import content_text, prepare_messages
from tulle.text.reasoning import ANSWERS, KNOWN
from tulle.text.template_facts import template_facts
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats import Arguments, Content, describe_tools, detect, joined

# Small templates with the constructs of each family's own.
HERMES = (
    "{%- if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% endif %}# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}Answer with <tool_call>\n"
    '{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n{%- elif messages[0].role == \'system\' %}'
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{%- elif m.role == 'assistant' %}<|im_start|>assistant\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content.strip('\\n') }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    '\n<tool_call>\n{"name": "{{ call.name }}", '
    '"arguments": {% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}'
    "{% endif %}}\n</tool_call>{%- endfor %}<|im_end|>\n{%- elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m.content }}\n</tool_response><|im_end|>\n{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "<|im_start|>assistant\n{%- endif %}"
)
QWEN3_CODER = (
    "{%- if tools %}{% for tool in tools %}{% set f = tool.function %}<function><name>{{ f.name }}</name>{% for "
    "k, v in f.parameters.properties | items %}<parameter>{{ k }}: {{ v.type }}</parameter>{% endfor %}</function>\n"
    "{% endfor %}Write <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<tool_call>\n<function={{ call.function.name }}>\n{% for k, v in "
    "call.function.arguments | items %}<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}<|system|>{% if tools %}"
    "Environment: ipython\n{% endif %}{{ system }}<|eot_id|>{%- for message in messages %}"
    '{%- if loop.first and tools is not none and tools %}{{ \'Answer with {"name": name, "parameters": {}}\\n\' }}'
    "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{%- endif %}"
    "{%- if message.role == 'ipython' or message.role == 'tool' %}<|ipython|>{% if message.content is mapping or "
    "message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}<|eot_id|>"
    "{%- elif 'tool_calls' in message %}{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call') }}"
    "{%- endif %}{%- set call = message.tool_calls[0].function %}<|assistant|>"
    "{{ '{\"name\": \"' + call.name + '\", ' }}{{ '\"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' }}<|eot_id|>"
    "{%- else %}<|{{ message.role }}|>{{ message.content | trim }}<|eot_id|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = "
    "messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS]"
    "{{ tools | map(attribute='function') | list | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{% if system and "
    "loop.first %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.tool_calls is defined and m.tool_calls %}"
    "[TOOL_CALLS] [{% for call in m.tool_calls %}{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('ids of 9 characters') }}{% endif %}{{ (call.function | tojson)[:-1] }}, \"id\": "
    "\"{{ call.id }}\"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_ARGS = (
    "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif "
    "m.role == 'user' %}{% if tools and loop.index0 < 2 %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set arguments = call.function.arguments %}{% if arguments is not string %}"
    "{% set arguments = arguments | tojson %}{% endif %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ arguments }}"
    "{% endfor %}{{ eos_token }}{% else %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)
HARMONY = (
    "<|start|>system<|message|># Valid channels: analysis, commentary, final.<|end|>{%- set developer = "
    "messages[0].content if messages[0].role in ('developer', 'system') else '' %}{%- if developer or tools %}"
    "<|start|>developer<|message|>{{ developer }}{% if tools %}namespace functions {{ '{' }}{% for t in tools %}"
    "type {{ t.function.name }} = ({{ t.function.parameters.properties | tojson }}) => any;{% endfor %}{{ '}' }}"
    "{% endif %}<|end|>{%- endif %}{%- set last = namespace(name=none) %}{%- for m in messages %}{%- if m.role == "
    "'assistant' %}{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{%- endif %}{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}{%- set last.name = call.name %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}"
    "<|call|>{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{%- endif %}"
    "{%- elif m.role == 'tool' %}<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{%- elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)
GEMMA_CALLS = (
    "{% macro value(v) %}{% if v is string %}<escape>{{ v }}<escape>{% elif v is mapping %}{{ '{' }}{% for k, x in v | "
    "dictsort %}{{ k }}:{{ value(x) }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}{% else %}{{ v | tojson }}"
    "{% endif %}{% endmacro %}{% if messages[0].role in ['developer', 'system'] or tools %}<start_of_turn>developer\n"
    "{% if messages[0].role in ['developer', 'system'] %}{{ messages[0].content }}{% endif %}{% for t in tools or [] %}"
    "<start_function_declaration>declaration:{{ t.function.name }}{{ value(t.function.parameters) }}"
    "<end_function_declaration>{% endfor %}<end_of_turn>\n{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "<start_function_response>response:{{ m.name }}{value:{{ value(m.content) }}}<end_function_response>"
    "{% elif m.role not in ['developer', 'system'] %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<start_function_call>call:{{ call.function.name }}"
    "{{ value(call.function.arguments) }}<end_function_call>{% endfor %}<end_of_turn>\n{% endif %}{% endfor %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must "
    "alternate') }}{% endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
TOOL_CODE = GEMMA2.replace(
    "{% for m", "{% if tools %}{{ tools | tojson }}\nAnswer with\n```tool_code\ncall()\n```\n{% endif %}{% for m", 1
)
TEXT_ARGUMENTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call['function']['name'] + call['function']['arguments'] }}"
    "{% endfor %}{% endfor %}"
)
PLAIN = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}CALLS\n{% endfor %}"
)
"""Roles, content and tools; ``CALLS`` is to come."""


def calls(before: str, one: str, between: str, after: str, template: str = PLAIN) -> str:
    """A template that writes calls so; ``one`` has NAME and ARGUMENTS."""
    name, arguments = "' ~ c.function.name ~ '", "' ~ (c.function.arguments | tojson) ~ '"
    body = "'" + one.replace("NAME", name).replace("ARGUMENTS", arguments) + "'"
    return template.replace(
        "CALLS",
        f"{{% if m.tool_calls %}}{before}{{% for c in m.tool_calls %}}{{{{ {body} }}}}"
        f"{{% if not loop.last %}}{between}{{% endif %}}{{% endfor %}}{after}{{% endif %}}",
    )


def tags(before: str, key: str, key_end: str, after: str, end: str) -> str:
    """A template that writes calls in tags; ``before`` has NAME."""
    return PLAIN.replace(
        "CALLS",
        f"{{% for c in m.tool_calls or [] %}}{before.replace('NAME', '{{ c.function.name }}')}{{% for k, v in "
        f"c.function.arguments | items %}}{key}{{{{ k }}}}{key_end}{{{{ v if v is string else v | tojson }}}}{after}"
        f"{{% endfor %}}{end}{{% endfor %}}",
    )


DEEPSEEK = PLAIN[PLAIN.index("{% for m in") :]
"""Calls without tools, which the system message describes."""
JSON_CALL = '{"name": "NAME", "arguments": ARGUMENTS}'
FAMILIES = {
    "seed-oss": tags(
        "<seed:tool_call>\n<function=NAME>\n", "<parameter=", ">", "</parameter>\n", "</function>\n</seed:tool_call>"
    ),
    "glm4.5": tags(
        "\n<tool_call>NAME\n", "\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call><|observation|>"
    ),
    "glm4.7": tags("<tool_call>NAME", "<arg_key>", "</arg_key><arg_value>", "</arg_value>", "</tool_call>"),
    "deepseek-v3": calls(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁end｜>",
        DEEPSEEK,
    ),
    "deepseek-v3.1": calls(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁end｜>",
        DEEPSEEK,
    ),
    "command": calls(
        "<|START_ACTION|>[\n    ",
        '{"tool_call_id": "0", "tool_name": "NAME", "parameters": ARGUMENTS}',
        ",\n    ",
        "\n]<|END_ACTION|>",
    ),
    "apertus": calls("<|tools_prefix|>[", '{"NAME": ARGUMENTS}', ", ", "]<|tools_suffix|>"),
    "tool-calls": calls("<tool_calls>[", JSON_CALL, ", ", "]</tool_calls>"),
    "nemotron": calls("<TOOLCALL>[", JSON_CALL, ", ", "]</TOOLCALL>"),
    "olmo3": PLAIN.replace(
        "CALLS",
        "{% if m.tool_calls %}<function_calls>{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in "
        "c.function.arguments | items %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}</function_calls>{% endif %}",
    ),
}
"""Templates that show calls, in each family's form."""
SILENT = {
    "granite": PLAIN.replace("CALLS", "").replace("{% for t", "Answer with <|tool_call|>.{% for t", 1),
    "lfm2": PLAIN.replace("CALLS", "").replace("{% for t", "<|tool_list_start|>{% for t", 1),
    "glm4": PLAIN.replace("CALLS", "").replace(
        "<|{{ m.role }}|>", "{{ '<|observation|>' if m.role == 'observation' else '<|' ~ m.role ~ '|>' }}"
    ),
    "phi": (
        "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m %}<|system|>{{ m['content'] }}<|tool|>"
        "{{ m['tools'] }}<|/tool|><|end|>{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    ),
    "hermes": PLAIN.replace("CALLS", "")
    .replace("tools or []", "xml_tools or []")
    .replace("{{ t.function.name }}: {{ t.function.description }}", "{{ t }}<tool_call></tool_call>"),
}
"""Templates that show none: calls become content, as the model writes them."""
TEMPLATES = {
    "hermes": HERMES,
    "qwen3-coder": QWEN3_CODER,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "harmony": HARMONY,
    "functiongemma": GEMMA_CALLS,
    "tool_code": TOOL_CODE,
    "generic": GEMMA2,
}
OTHERS = {"text arguments": TEXT_ARGUMENTS}
CALL = {
    "id": "call_0123456789abcdefghijABCD",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "K\\u00f6ln \\"x\\"", "days": 2}'},
}
TALK: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": "raining?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": CALL["id"], "content": [{"type": "text", "text": "rain: 1 < 2"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Thanks"},
]


def with_template(template: str) -> ModelTokenizer:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return byte_tokenizer(list(special.values()), special=special, templates={"default": template} if template else {})


@pytest.mark.parametrize(("name", "template"), [*FAMILIES.items(), *SILENT.items()])
def test_formats_of_families(name: str, template: str) -> None:
    """Detected by the template alone; the history shows calls, which the format reads, and results."""
    tokenizer = with_template(template)
    format = detect(tokenizer)
    assert (format.name, format.supports_tools) == (name, not name.startswith("deepseek"))
    now = {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    asked = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [CALL, now]}]
    found = prepare_messages([*asked, TALK[3]], tokenizer, format, TOOLS)
    text = tokenizer.chat(found.messages, tools=found.tools, add_generation_prompt=False)
    assert "Does plot." in text and "rain: 1 < 2" in text
    assert (found.tools is None) == (name.startswith("deepseek") or name == "phi")
    parser = format.parser(TOOLS, eager=False)
    deltas = joined([*parser.push(text[text.rindex("<|assistant|>") + 13 :]), *parser.end()])
    arguments = [json.loads(delta.text) for delta in deltas if isinstance(delta, Arguments)]
    assert arguments == [{"city": 'Köln "x"', "days": 2}, {}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_detected(name: str) -> None:
    found = detect(with_template(TEMPLATES[name]))
    assert (found.name, found.supports_tools) == (name, name != "generic")
    assert found.reasoning == (KNOWN[0] if name == "hermes" else format_named(name).reasoning)
    assert (found.reasoning is not None) == (name in ("hermes", "harmony"))
    assert not found.keep_special


def test_detection_by_tokens_and_type() -> None:
    def of(template: str, special: list[str], model_type: str = "", kind: str = "default") -> Any:
        return detect(byte_tokenizer(special, templates={kind: template}), model_type)

    assert of(MISTRAL, ["[TOOL_CALLS]", "[ARGS]"]).name == "mistral-args"
    assert of(MISTRAL, ["[TOOL_CALLS]"]).keep_special and not of(MISTRAL, ["</s>"]).keep_special
    assert of(MISTRAL, ["[THINK]", "[/THINK]"]).reasoning.start == "[THINK]"
    assert of(HERMES, ["<think>", "</think>"]).keep_special
    assert of(HERMES, [], kind="tool_use").name == "hermes"
    assert (
        of(GEMMA_CALLS.replace("<start_function_call>", "<|tool_call>").replace("<escape>", '<|"|>'), []).name
        == "gemma4"
    )
    shows = "{{ messages[-1].content }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    assert (of(shows, []).name, of(shows, []).supports_tools) == ("generic", False)
    assert of(shows, [], "llama4_text").name == "python"
    assert of(shows, ["<|python_tag|>"], "llama").name == "llama3"
    told = of(shows + '{"name": "f", "arguments": {}}', [])
    assert (told.name, told.supports_tools) == ("generic", True)
    # A format that does not read what the template itself writes does not count.
    other = HERMES.replace('{"name": "{{', '{"call": "{{')
    assert (of(other, []).name, of(other, []).supports_tools) == ("generic", False)
    # An answer that begins with reasoning, which the history does not show.
    assert of(HERMES.replace("assistant\n{%- endif %}", "assistant\n<think>\n{%- endif %}"), []).name == "hermes"
    glm = shows + "<tool_call>name<arg_key>k</arg_key>"
    assert (of(glm, []).name, of(glm, []).supports_tools) == ("glm4.7", True)
    assert of(shows, ["<|tool_call_start|>"]).name == "lfm2"
    assert of(shows + "<response>x</response>", []).answer == ANSWERS[2] and of(shows + "<response>", []).answer is None
    spoken = of(shows + "<|START_RESPONSE|>x<|END_RESPONSE|>", ["<|START_RESPONSE|>"])
    assert spoken.keep_special and spoken.marks_answers and not of(shows, ["<|START_RESPONSE|>"]).marks_answers
    assert of("{{ messages[-1].content }}", [], "gpt_oss").name == "harmony"
    bare = detect(byte_tokenizer())
    assert (bare.name, bare.supports_tools, bare.reasoning) == ("generic", False, None)


@pytest.mark.parametrize("name", [*TEMPLATES, *OTHERS])
@pytest.mark.parametrize("with_tools", [True, False])
def test_history_renders_as_with_transformers(tmp_path: Path, name: str, with_tools: bool) -> None:
    template = (TEMPLATES | OTHERS)[name]
    ours = with_template(template)
    format = detect(ours)
    before = json.dumps(TALK)
    found = prepare_messages(TALK, ours, format, TOOLS if with_tools else None)
    assert json.dumps(TALK) == before
    rendered = ours.chat(found.messages, tools=found.tools)
    ours.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **ours.special}))
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    # gpt-oss reads the reasoning under another key, which rendering adds.
    messages = [m | ({"thinking": m["reasoning_content"]} if "reasoning_content" in m else {}) for m in found.messages]
    options: dict[str, Any] = {"tools": found.tools, "add_generation_prompt": True}
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, **options)
    for part in ("Be brief.", "Is it\nraining?", "weather", "Köln", "rain: 1", "Yes.", "Thanks"):
        assert part in rendered, part
    for wrong in ("None", "'city'", '\\"city', "undefined"):
        assert wrong not in rendered
    assert ("Does now." in rendered or "now" in rendered) == with_tools


def test_calls_in_a_template_are_read_back() -> None:
    """What the history shows of a call is what the parser reads."""
    read = [name for name in TEMPLATES if name not in ("tool_code", "generic")]  # they show calls as lines of JSON
    for name in read:
        tokenizer = with_template(TEMPLATES[name])
        format = detect(tokenizer)
        messages = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        found = prepare_messages(messages, tokenizer, format, TOOLS)
        options = {"tools": found.tools, "add_generation_prompt": False}
        before = tokenizer.chat(found.messages[:-1], **options)
        text = tokenizer.chat(found.messages, **options).removeprefix(before).removeprefix("<|assistant|>")
        parser = format.parser(TOOLS)
        deltas = [*parser.push(text), *parser.end()]
        written = "".join(delta.text for delta in deltas if type(delta).__name__ == "Arguments")
        assert json.loads(written) == {"city": 'Köln "x"', "days": 2}, name


def test_what_templates_render() -> None:
    def facts(template: str) -> str:
        found = template_facts(template, {"bos_token": "<s>", "eos_token": "</s>"})
        return " ".join(name for name, value in vars(found).items() if value)

    assert facts(HERMES) == "tools system call results"
    assert facts(HARMONY) == "tools system developer call results"
    assert facts(MISTRAL) == "tools system call results"
    assert facts(GEMMA2) == ""
    assert facts(TEXT_ARGUMENTS) == "tools system developer call results text_arguments"
    assert facts("{% if %}") == ""


def test_a_template_without_tools_gets_them_in_words() -> None:
    tokenizer = with_template(GEMMA2)
    found = prepare_messages(TALK, tokenizer, detect(tokenizer), TOOLS, "required")
    assert found.tools is None
    words = describe_tools(TOOLS, "required")
    call = {"name": "weather", "arguments": {"city": 'Köln "x"', "days": 2}}
    assert [m["role"] for m in found.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert found.messages[0]["content"] == f"Be brief.\n\n{words}\n\nIs it\nraining?"
    assert found.messages[1]["content"] == json.dumps(call, ensure_ascii=False)
    assert found.messages[2]["content"] == "Result of weather:\nrain: 1 < 2"
    assert prepare_messages(TALK[1:2], tokenizer, detect(tokenizer)).messages == [
        {"role": "user", "content": "Is it\nraining?"}
    ]
    # Results and the user's next words are one turn.
    found = prepare_messages([*TALK[1:4], TALK[3], TALK[5]], tokenizer, detect(tokenizer))
    result = "Result of weather:\nrain: 1 < 2"
    assert found.messages[2:] == [{"role": "user", "content": f"{result}\n\n{result}\n\nThanks"}]


def test_ids_and_names() -> None:
    tokenizer = with_template(MISTRAL)
    format = detect(tokenizer)
    call, result = prepare_messages(TALK[1:4], tokenizer, format, TOOLS).messages[1:]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"] == format.template_id(CALL["id"])
    assert result["name"] == "weather"


def test_a_broken_call_stays_visible() -> None:
    tokenizer = with_template(HERMES)
    broken = {**CALL, "function": {"name": "now", "arguments": '{"a": tr'}}
    messages = [TALK[1], {"role": "assistant", "tool_calls": [broken]}]
    found = prepare_messages(messages, tokenizer, detect(tokenizer), TOOLS)
    assert json.dumps({"invalid_json": '{"a": tr'}) in tokenizer.chat(found.messages, tools=found.tools)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "x"}, "with a role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "type 'image_url'"),
        ({"role": "user", "content": 3}, "expected content of text"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "function.name"),
    ],
)
def test_wrong_messages_are_refused(message: Mapping[str, Any], error: str) -> None:
    tokenizer = with_template(HERMES)
    with pytest.raises(UserError, match=error):
        prepare_messages([message], tokenizer, detect(tokenizer))


def test_content() -> None:
    assert content_text(None) == "" and content_text("x") == "x"
    assert content_text([{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "b"}, "c"]) == "a\nb\nc"
    assert format_named("hermes").parser().push("a") == [Content("a")]
