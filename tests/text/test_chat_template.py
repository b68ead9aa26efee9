"""Chat templates: what transformers' apply_chat_template gives, in a sandbox."""

from __future__ import annotations

import enum
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers_in_memory import byte_level
from transformers import AutoTokenizer

from tulle.errors import UserError
from tulle.text.chat_template import render
from tulle.text.tokenizer_folder import read_tokenizer

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be <b>brief</b> & "clear" – naïve 世界.'},
    {"role": "user", "content": "Hi\n there ", "name": None},
    {"role": "assistant", "content": "Yes.", "thinking": "hm", "tool_calls": None},
    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": {"type": "number"}, "a": 1.5}}}]
DOCUMENTS = [{"title": "T", "text": "a < b"}]
LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
TEMPLATES = {
    "plain": LOOP + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ unk_token }}|{{ image_token }}",
    "absent": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ nothing is defined }}",
    "tojson": "{{ tools | tojson }}\n{{ messages | tojson(indent=2) }}{{ documents | tojson(sort_keys=True) }}"
    "{{ messages[0].content | tojson(ensure_ascii=True) }}{{ messages | tojson(separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}{%- endif %}{% endfor %}",
    "white space": "  {% if true %}\n    x\n  {% endif %}\n{%- set a = 1 %}\n{{ a }}\n\n",
    "namespace": "{% set n = namespace(count=0, self=2) %}{% for m in messages %}{% set n.count = n.count + 1 %}"
    "{% endfor %}{{ n.count }}{{ n.self }}",
    "dict": "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['x', 'y'], 3) }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }};{% endfor %}",
    "left out": "{% for m in messages %}{{ 'name' in m }}{{ 'tool_calls' in m }}{% endfor %}",
    "methods": "{{ messages[1].content.strip().split('\\n')[-1] }}{{ messages[0]['content'][::-1] | upper }}",
    "macro": "{% macro say(x) %}[{{ x | trim }}]{% endmacro %}{% for m in messages %}{{ say(m.role) }}{% endfor %}",
    "variables": "{{ enable_thinking }}{{ level }}",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(folder: Path, **config: Any) -> None:
    base = {"bos_token": "<s>", "eos_token": "<|im_end|>", "image_token": "<extra>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))


def assert_as_transformers(folder: Path, messages: list[dict[str, Any]] = TALK, **options: Any) -> str:
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    named = {"chat_template" if k == "template" else k: v for k, v in options.items()}
    expected = theirs.apply_chat_template(messages, tokenize=False, **({"add_generation_prompt": True} | named))
    ours = read_tokenizer(folder)
    found = ours.chat(messages, **options)
    assert found == expected
    ids = theirs.apply_chat_template(messages, return_dict=False, **({"add_generation_prompt": True} | named))
    assert ours.encode(found, special=False) == ids
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(folder: Path, name: str) -> None:
    configure(folder, chat_template=TEMPLATES[name])
    assert_as_transformers(folder, enable_thinking=False, level="high")
    assert_as_transformers(folder, tools=TOOLS, documents=DOCUMENTS, add_generation_prompt=False)


def test_named_templates(folder: Path) -> None:
    named = [{"name": n, "template": n + " {{ messages[0].role }}"} for n in ("default", "tool_use", "rag")]
    configure(folder, chat_template=named)
    assert assert_as_transformers(folder) == "default system"
    assert assert_as_transformers(folder, tools=TOOLS) == "tool_use system"
    assert assert_as_transformers(folder, template="rag") == "rag system"
    with pytest.raises(UserError, match="called 'rap', found default, rag, tool_use"):
        read_tokenizer(folder).chat(TALK, template="rap")
    configure(folder, chat_template=named[1:])
    with pytest.raises(UserError, match="called 'default', found rag, tool_use"):
        read_tokenizer(folder).chat(TALK)


def test_files_win_over_the_configuration(folder: Path) -> None:
    configure(folder, chat_template="configuration")
    (folder / "chat_template.jinja").write_text("file – {{ messages | length }}\n", encoding="utf-8")
    assert assert_as_transformers(folder) == "file – 4"
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    (more / "rag.jinja").write_text("rag")
    assert assert_as_transformers(folder) == "file – 4"
    assert assert_as_transformers(folder, tools=TOOLS) == "tools"
    assert assert_as_transformers(folder, template="rag") == "rag"
    (folder / "chat_template.jinja").unlink()
    assert set(read_tokenizer(folder).templates) == {"rag", "tool_use"}


def test_the_date() -> None:
    before, found, after = datetime.now(), render("{{ strftime_now('%Y-%m-%d %H') }}", TALK), datetime.now()
    assert found in (before.strftime("%Y-%m-%d %H"), after.strftime("%Y-%m-%d %H"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ dict.__class__.x }}", "unsafe"),
        ("{{ strftime_now.__globals__.x }}", "unsafe"),
        ("{% set n = namespace(_x=1) %}", "_x"),
        ("{% include 'other' %}", "no loader|other"),
        ("{{ range(999999999) }}", "[Rr]ange"),
    ],
)  # fmt: skip
def test_what_cannot_or_may_not_be_rendered(template: str, message: str) -> None:
    with pytest.raises(UserError, match=f"chat template that can be filled in, found: .*({message})"):
        render(template, TALK)


def test_a_template_sees_plain_values_alone() -> None:
    class Kind(enum.StrEnum):
        A = "a"

    class Open:
        secret = 1

    template = "{{ messages[0].content }} {{ messages[0].open }} {{ x }}"
    found = render(template, [{"role": "user", "content": Kind.A, "open": Open()}], variables={"x": (1, True)})
    assert found == "a <Open> (1, True)"


def test_a_model_without_a_template(folder: Path) -> None:
    configure(folder)
    with pytest.raises(UserError, match="expected a model with a chat template"):
        read_tokenizer(folder).chat(TALK)
