"""Formats of tool calls: read in any pieces, nothing lost, and what their grammars allow is read back."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tool_samples import END_OF_TEXT, PARAMETERS, TOOLS, byte_tokenizer, format_named, numbered

from tulle.errors import UserError
from tulle.text.reasoning import ANSWERS, KNOWN, AnswerMarks, ReasoningMarks
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats import (
    Arguments,
    Content,
    Delta,
    Reasoning,
    ToolCall,
    ToolFormat,
    call_id,
    describe_tools,
    read_tools,
)
from tulle.text.tool_formats.detection import FORMATS
from tulle.text.tool_formats.lark import Lark

NAMES = [kind.name for kind in FORMATS]
THINK = KNOWN[0]
Flat = list[tuple[str, str]]

# A call of weather with a city that has marks and escapes in it, then a call of now, as each format writes them.
CITY = 'Åb {"<b>"} \\ \u2028 end'
TWO_CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": %s, "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3-coder": "<tool_call>\n<function=weather>\n<parameter=city>\n%s\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "llama3": '<|python_tag|>{"name": "weather", "parameters": {"city": %s, "days": 2}}; {"name": "now", '
    '"parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": %s, "days": 2}, "id": "a1b2c3d4e"}, '
    '{"name": "now", "arguments": {}}]',
    "mistral-args": '[TOOL_CALLS]weather[ARGS]{"city": %s, "days": 2}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}',
    "harmony": "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": %s, "days": 2}<|call|><|start|>assistant to=functions.now<|channel|>commentary<|message|>{}',
    "functiongemma": "<start_function_call>call:weather{city:<escape>%s<escape>,days:2}<end_function_call>"
    "<start_function_call>call:now{}<end_function_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>%s<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>',
    "seed-oss": "<seed:tool_call>\n<function=weather>\n<parameter=city>%s</parameter>\n<parameter=days>2</parameter>\n"
    "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    "glm4.5": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>%s</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "glm4.7": "<tool_call>weather<arg_key>city</arg_key><arg_value>%s</arg_value><arg_key>days</arg_key>"
    "<arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
    "glm4": 'weather\n{"city": %s, "days": 2}\nnow\n{}',
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": %s, "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": %s, "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "command": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": %s, '
    '"days": 2}},\n    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    "apertus": '<|tools_prefix|>[{"weather": {"city": %s, "days": 2}}, {"now": {}}]<|tools_suffix|>',
    "phi": '<|tool_call|>[{"name": "weather", "arguments": {"city": %s, "days": 2}}, {"name": "now", "arguments": {}}]'
    "<|/tool_call|>",
    "granite": '<|tool_call|>[{"name": "weather", "arguments": {"city": %s, "days": 2}}, {"name": "now"}]',
    "tool-calls": '<tool_calls>[{"name": "weather", "arguments": {"city": %s, "days": 2}}, {"name": "now"}]'
    "</tool_calls>",
    "nemotron": '<TOOLCALL>[{"name": "weather", "arguments": {"city": %s, "days": 2}}, {"name": "now"}]</TOOLCALL>',
    "python": "[weather(city=%s, days=2), now()]",
    "lfm2": "<|tool_call_start|>[weather(city=%s, days=2), now()]<|tool_call_end|>",
    "olmo3": "<function_calls>weather(city=%s, days=2)\nnow()</function_calls>",
    "tool_code": "```tool_code\nprint(default_api.weather(city=%s, days=2))\nnow()\n```",
    "generic": '```json\n[{"name": "weather", "arguments": {"city": %s, "days": 2}}, {"name": "now"}]\n```',
}
RAW = ("qwen3-coder", "seed-oss", "glm4.5", "glm4.7", "functiongemma", "gemma4")
"""Formats whose strings stand as they are."""
AT_THE_BEGINNING = ("python", "glm4")
"""Formats whose calls are all of the answer."""
MARKS = sorted({mark for kind in FORMATS for mark in kind.marks} | {"<think>", "</think>", "```tool_code\n", "```"})
ANSWER_MARKS = [mark for marks in ANSWERS for mark in (marks.start, marks.end)]


def two_calls(name: str, city: str = CITY) -> str:
    return TWO_CALLS[name] % (city if name in RAW else json.dumps(city, ensure_ascii=False))


def read(
    format: ToolFormat, text: str, cuts: list[int] | None = None, tools: list[dict[str, object]] | None = None,
    eager: bool = False, prompt: str = "",
) -> list[Delta]:  # fmt: skip
    numbers = iter(range(10**6))
    parser = format.parser(TOOLS if tools is None else tools, prompt, eager=eager, ids=lambda: f"id{next(numbers)}")
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts or ())})
    return numbered(parser, [text[a:b] for a, b in zip(places, places[1:], strict=False)])


def flat(deltas: list[Delta]) -> Flat:
    """(kind or the tool's name, text) of content, reasoning and whole calls; arguments as sorted JSON."""
    found: Flat = []
    for delta in deltas:
        if isinstance(delta, ToolCall):
            found.append((delta.name, ""))
        elif isinstance(delta, Arguments):
            name, before = found.pop()
            assert not before
            found.append((name, json.dumps(json.loads(delta.text), sort_keys=True)))
        else:
            found.append((type(delta).__name__, delta.text))
    return found


def call(name: str, **arguments: object) -> tuple[str, str]:
    return name, json.dumps(arguments, sort_keys=True)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_calls_are_read(name: str, eager: bool) -> None:
    format = format_named(name)
    calls = [call("weather", city=CITY, days=2), call("now")]
    deltas = read(format, two_calls(name), eager=eager)
    assert flat(deltas) == calls
    assert [d for d in deltas if isinstance(d, ToolCall)] == [ToolCall(0, "id0", "weather"), ToolCall(1, "id1", "now")]
    assert [d.index for d in deltas if isinstance(d, Arguments)] == [0, 1]
    if name not in AT_THE_BEGINNING:
        lead = "<|channel|>final<|message|>" if name == "harmony" else ""
        before = "<|python_tag|>" if name == "llama3" else "\n"
        text = f"{lead}Let me see.{before}{two_calls(name).removeprefix('<|python_tag|>')}"
        assert flat(read(format, text, eager=eager)) == [("Content", "Let me see."), *calls]


@pytest.mark.parametrize("name", NAMES)
def test_without_tools_a_text_is_content(name: str) -> None:
    if name != "harmony":
        assert read(format_named(name), two_calls(name), tools=[]) == [Content(two_calls(name))]


fragments = st.one_of(
    st.sampled_from(
        [
            *MARKS,
            *ANSWER_MARKS,
            "\n",
            " ",
            "{",
            "}",
            "[",
            "]",
            '"',
            "\\",
            ",",
            ":",
            "(",
            ")",
            "=",
            "<",
            "now",
            "weather",
        ]
    ),
    st.sampled_from(['{"name": "now"}', '{"name": "now", "arguments": {', '"city": "x', "call:now{", "now()", "ab c"]),
    st.sampled_from(["now[ARGS]{}", "<function=now>", "<parameter=city>\n", "assistant", " to=functions.now"]),
    st.sampled_from([text for name in NAMES for text in (two_calls(name), two_calls(name)[:-30])]),
    st.text(max_size=4),
)
texts = st.lists(fragments, max_size=8).map("".join)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_however_it_is_cut(name: str, eager: bool, data: st.DataObject) -> None:
    thinks, marked = data.draw(st.booleans()), data.draw(st.booleans())
    options: dict[str, Any] = {"reasoning": THINK if thinks else None, "answer": ANSWERS[2] if marked else None}
    format = format_named(name, **({} if name == "harmony" else options))
    text = data.draw(st.one_of(texts, st.sampled_from([two_calls(n) for n in NAMES])))
    cuts = data.draw(st.one_of(st.lists(st.integers(0, 400), max_size=12), st.just(list(range(len(text))))))
    whole = read(format, text, eager=eager)
    assert read(format, text, cuts, eager=eager) == whole
    if eager:
        return
    calls = flat(whole)  # all arguments parse
    assert all(json.loads(found).__class__ is dict for kind, found in calls if kind in PARAMETERS)
    if name == "harmony":
        return
    thinks = thinks and text.lstrip().startswith("<think>")
    if not thinks and not marked and not any(isinstance(delta, ToolCall) for delta in whole):
        assert "".join(delta.text for delta in whole if isinstance(delta, Content)) == text
    left = text
    for delta in whole:
        if isinstance(delta, Content | Reasoning):
            assert delta.text in left
            left = left[left.index(delta.text) + len(delta.text) :]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("harmony", *AT_THE_BEGINNING)])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_nothing_between_calls_is_lost(name: str, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.text("abcdefg. é", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=4))
    separator = "\n<|python_tag|>" if name == "llama3" else "\n"
    block = two_calls(name).removeprefix("<|python_tag|>")
    deltas = flat(read(format_named(name), f"{words[0]}" + "".join(f"{separator}{block}\n{w}" for w in words[1:])))
    expected = [("Content", words[0])]
    for word in words[1:]:
        expected += [call("weather", city=CITY, days=2), call("now"), ("Content", word)]
    assert deltas == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": tru}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "later", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": NaN}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": "\n"}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": "\\x"}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": 01}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": 1.}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": 1,}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": [}}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a"'),
        ("hermes", "<tool_call>\nnow()\n</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": ' + '{"a":' * 300 + "1" + "}" * 301 + "</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ' + "1" * 5000 + "}}</tool_call>"),
        ("qwen3-coder", "<tool_call>\n<function=now>\n<parameter=a>\n1\n</function>\n</tool_call>"),
        ("llama3", '{"name": "later", "parameters": {}}'),
        ("llama3", '{"city": "Paris"}'),
        ("mistral", "[TOOL_CALLS]later[ARGS]{}"),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {]}]'),
        ("python", "[now(f(1))]"),
        ("python", "[now(a=__import__('os'))]"),
        ("python", "[now(**{'a': 1})]"),
        ("python", "[now(1)]"),
        ("python", "[now(a=1, a=2)]"),
        ("python", "[now(a=1+1)]"),
        ("python", "[now(a=f'{1}')]"),
        ("python", "[now(a=b'1')]"),
        ("python", "[now(a=-'1')]"),
        ("python", "[now(a=1"),
        ("python", "[now(a=-True)]"),
        ("python", "[now(a=" + "[" * 100 + "]" * 100 + ")]"),
        ("python", "[now(a=" + "-" * 50_000 + "1)]"),
        ("tool_code", "```tool_code\nimport os\n```"),
        ("functiongemma", "<start_function_call>call:now{a:b}<end_function_call>"),
        ("functiongemma", "<start_function_call>call:now{a:<escape>b<end_function_call>"),
        ("gemma4", "<|tool_call>call:now{a:" + "[" * 100 + "]" * 100 + "}<tool_call|>"),
        ("deepseek-v3.1", "<｜tool▁call▁begin｜>later<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>[1]<｜tool▁call▁end｜>"),
        ("deepseek-v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{]\n```"),
        ("glm4.5", "<tool_call>now\n<arg_key>a</arg_key>\n1\n</tool_call>"),
        ("glm4.7", "<tool_call>now<arg_key>a</arg_key><arg_value>1</tool_call>"),
        ("glm4.7", "<tool_call>later</tool_call>"),
        ("glm4", "now\n[1]"),
        ("glm4", 'So: now\n{"a": 1}'),
        ("seed-oss", "<seed:tool_call><function=now><parameter=a>1</function></seed:tool_call>"),
        ("command", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "later", "parameters": {}}]<|END_ACTION|>'),
        ("command", '<|START_ACTION|>[{"tool_name": "now", "parameters": {"a": }}]<|END_ACTION|>'),
        ("apertus", '<|tools_prefix|>[{"now": 1}]<|tools_suffix|>'),
        ("apertus", '<|tools_prefix|>[{"now": {}, "weather": {}}]<|tools_suffix|>'),
        ("phi", "some functools [1]"),
        ("granite", "<|tool_call|>now"),
        ("lfm2", "<|tool_call_start|>[now(a=f(1))]<|tool_call_end|>"),
        ("olmo3", "<function_calls>now(a=1</function_calls>"),
        ("olmo3", "<function_calls></function_calls>"),
        ("generic", '{"name": "later", "arguments": {}}'),
        ("generic", '{"answer": [1, 2]}\n```json\n{"a": "b"}\n```\n[1]'),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    format = format_named(name)
    assert read(format, text, list(range(len(text)))) == [Content(text)]
    assert read(format, f"{text}\nEnd.") == [Content(f"{text}\nEnd.")]


def test_a_call_that_goes_wrong_after_it_was_given() -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {"a": tru}}\n</tool_call>\n' + two_calls("hermes")
    assert read(format_named("hermes"), text, eager=True)[:3] == [
        ToolCall(0, "id0", "now"), Arguments(0, '{"a": tru'), Content("}}\n</tool_call>"),
    ]  # fmt: skip
    # The calls after it are read, by both.
    assert flat(read(format_named("hermes"), text))[1:] == flat(read(format_named("hermes"), two_calls("hermes")))
    assert [d.name for d in read(format_named("hermes"), text, eager=True)[3:] if isinstance(d, ToolCall)] == [
        "weather", "now",
    ]  # fmt: skip


def test_arguments_come_while_they_are_written() -> None:
    streamed = [name for name in NAMES if name not in ("python", "tool_code", "lfm2", "olmo3")]
    for name in streamed:
        text = two_calls(name, "x" * 50)
        parser = format_named(name).parser(TOOLS)
        found = [delta for c in text[: text.index("x" * 40) + 40] for delta in parser.push(c)]
        written = "".join(delta.text for delta in found if isinstance(delta, Arguments))
        assert re.fullmatch(r'\{"city": ?"x{40}', written), name


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', [call("now", a=1)]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', [call("now")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}', [call("now")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}', [call("now", a=1)]),
        ("hermes", '<tool_call>{"type": "function", "name": "now", "parameters": {}}', [call("now")]),
        ("hermes", '<tool_call>[{"name": "now"}, {"name": "now"}]</tool_call>', [call("now"), call("now")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "\\ud83d\\ude42\\n"}}', [call("now", a="🙂\n")]),
        ("hermes", '<tool_call>{"name": "n\\u006fw"}', [call("now")]),
        ("llama3", ' {"type": "function", "name": "now", "parameters": {}}', [call("now")]),
        ("llama3", '<|python_tag|>weather.call(city="x")', [call("weather", city="x")]),
        ("mistral", '[TOOL_CALLS]now{"a": 1}', [call("now", a=1)]),
        ("mistral-args", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', [call("now")]),
        ("qwen3-coder", "<function=now>\n</function>", [call("now")]),
        (
            "qwen3-coder",
            "<tool_call><function=weather><parameter=city>\n<parameter=a>\n</parameter>\n1</parameter>"
            "<parameter=days>3</parameter><parameter=more>True</parameter></function></tool_call>",
            [call("weather", city="<parameter=a>\n</parameter>\n1", days=3, more=True)],
        ),
        ("qwen3-coder", "<function=plot><parameter=points>[{</parameter></function>", [call("plot", points="[{")]),
        ("python", "[weather('x', days=-1)]", [call("weather", city="x", days=-1)]),
        (
            "python",
            "[now(a='''x\n\"y''', b={'k': (1, [True, None])}, c=true, d=1e999, e=\"\\ud83d\\ude42\", f=0x10)]",
            [call("now", a='x\n"y', b={"k": [1, [True, None]]}, c=True, d=float("inf"), e="🙂", f=16)],
        ),
        ("python", "[now(é='世界', a=')')]", [call("now", é="世界", a=")")]),
        ("python", "[now(from='a', x-y=[1], é=2)]", [call("now", **{"from": "a", "x-y": [1], "é": 2})]),
        ("deepseek-v3", two_calls("deepseek-v3.1", "x"), [call("weather", city="x", days=2), call("now")]),
        ("deepseek-v3.1", two_calls("deepseek-v3", "x"), [call("weather", city="x", days=2), call("now")]),
        ("deepseek-v3.1", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>```json\n{}\n```", [call("now")]),
        ("glm4.5", two_calls("glm4.7", "x"), [call("weather", city="x", days=2), call("now")]),
        ("glm4.7", two_calls("glm4.5", "x"), [call("weather", city="x", days=2), call("now")]),
        (
            "glm4.7",
            "<tool_call>weather <arg_key>city</arg_key> <arg_value>\n</arg_value> </arg_value> </tool_call>",
            [call("weather", city="\n</arg_value> ")],
        ),
        ("glm4", ' now {"a": 1}\n', [call("now", a=1)]),
        ("seed-oss", "<function=now>\n<parameter=a>\n1\n</parameter>\n</function>", [call("now", a=1)]),
        ("command", '<|START_ACTION|>{"tool_name": "now", "parameters": {"a": 1}}', [call("now", a=1)]),
        ("apertus", '<|tools_prefix|>{"now": {"a": 1}}', [call("now", a=1)]),
        ("phi", 'functools[{"name": "now", "arguments": {}}]', [call("now")]),
        ("phi", '<|tool_call|>{"name": "now", "arguments": {}}<|/tool_call|>', [call("now")]),
        ("granite", '<tool_call>[{"name": "now", "arguments": {}}]', [call("now")]),
        ("lfm2", '<|tool_call_start|>[{"name": "now", "arguments": {}}]<|tool_call_end|>', [call("now")]),
        ("lfm2", "<|tool_call_start|>[now(a='b')]", [call("now", a="b")]),
        ("olmo3", "<function_calls>\nnow(a=true)\n</function_calls>\n", [call("now", a=True)]),
        ("functiongemma", '<start_function_call>call:now{a:{b:[1,{c:null}]},d:"x"}', None),
        ("generic", '{"name": "now", "arguments": {}}\n{"name": "now"}', [call("now"), call("now")]),
        ("generic", 'So:\n```\n{"name": "now"}\n```\nDone.', [("Content", "So:"), call("now"), ("Content", "Done.")]),
    ],
)
def test_other_ways_to_write_calls(name: str, text: str, expected: Flat | None) -> None:
    expected = expected or [call("now", a={"b": [1, {"c": None}]}, d="x")]
    for eager in (True, False):
        assert flat(read(format_named(name), text, list(range(len(text))), eager=eager)) == expected


VALUES: dict[str, object] = {
    "text": {"type": "string"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "string"}]},
    "count": {"$ref": "#/$defs/N"},
    "list": {"type": "array"},
    "flag": {"type": "boolean"},
    "word": {"enum": ["5", "x"]},
    "odd": {"anyOf": 3},
}


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("text", "5", "5"),
        ("text", ' {"a": 1} ', ' {"a": 1} '),
        ("maybe", "5", "5"),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", '"a"', "a"),
        ("maybe", "a b", "a b"),
        ("maybe", "[1", "[1"),
        ("maybe", "'a'", "'a'"),
        ("unknown", "1, 2", "1, 2"),
        ("either", "5", 5),
        ("either", "5.5", "5.5"),
        ("either", "true", "true"),
        ("count", "5", 5),
        ("count", "five", "five"),
        ("list", '["a", 1]', ["a", 1]),
        ("list", "['a', {'b': None}]", ["a", {"b": None}]),
        ("list", "[f(1)]", "[f(1)]"),
        ("list", "[" * 300, "[" * 300),
        ("flag", "True", True),
        ("word", "5", "5"),
        ("odd", "5", 5),
        ("unknown", '{"a": [1]}', {"a": [1]}),
    ],
)
@pytest.mark.parametrize("name", ["qwen3-coder", "seed-oss", "glm4.5", "glm4.7"])
def test_values_follow_the_schema(name: str, key: str, written: str, value: object) -> None:
    schema = {"$defs": {"N": {"type": "integer"}}, "properties": VALUES}
    format: Any = format_named(name)
    text = format.written([("f", {key: written})])
    assert flat(read(format, text, tools=[{"name": "f", "parameters": schema}])) == [call("f", **{key: value})]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(
    found=st.lists(
        st.fixed_dictionaries(
            {"city": st.text('ab<>/"\\\n é🙂', max_size=8)}, optional={"days": st.integers(), "more": json_values}
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_written_is_read_back(name: str, found: list[dict[str, Any]]) -> None:
    if name in RAW:  # text that spells a value is that value
        found = [{k: v for k, v in one.items() if k != "more" or not isinstance(v, str)} for one in found]
    text = format_named(name).written([("weather", one) for one in found])
    assert flat(read(format_named(name), text)) == [call("weather", **one) for one in found]


@pytest.mark.parametrize("marks", ANSWERS, ids=lambda marks: marks.start)
def test_marks_around_the_answer(marks: AnswerMarks) -> None:
    format = format_named("tool-calls", reasoning=THINK, answer=marks)
    start, end, calls = marks.start, marks.end, two_calls("tool-calls")
    expected = [call("weather", city=CITY, days=2), call("now")]
    for text, found in [
        (f"{start}\nYes {end[:4]} no\n{end}\n", [("Content", f"Yes {end[:4]} no")]),
        (f"<think>hm</think>\n{start}Yes{end} More.", [("Reasoning", "hm"), ("Content", "YesMore.")]),
        (f"\n{start}Yes{end[:-1]}", [("Content", f"Yes{end[:-1]}")]),
        (f"{start}Yes{end[:3]}{calls}", [("Content", f"Yes{end[:3]}"), *expected]),
        (f"{start}\n{end}\n{calls}", expected),
        (f"{start}A\n{calls}{end}", [("Content", "A"), *expected]),
        (f"No {start}Yes{end}", [("Content", f"No {start}Yes{end}")]),
    ]:
        for eager in (True, False):
            assert flat(read(format, text, eager=eager)) == found, text
            assert flat(read(format, text, list(range(len(text))), eager=eager)) == found, text
    assert read(format, f"Yes{end}", prompt=f"<think></think>\n{start}\n") == [Content("Yes")]


@pytest.mark.parametrize(("name", "marks"), [("apertus", KNOWN[5]), ("command", KNOWN[3])])
def test_calls_in_the_midst_of_reasoning(name: str, marks: ReasoningMarks) -> None:
    format = format_named(name, reasoning=marks)
    expected = [("Reasoning", "hm"), call("weather", city=CITY, days=2), call("now")]
    for lead in (f"{marks.start}hm", f"{marks.start}hm{marks.end}"):
        assert flat(read(format, lead + two_calls(name))) == expected
    text = f"{marks.start}hm {two_calls(name)}"
    assert isinstance(read(format, text, tools=[])[0], Reasoning)
    # Where the format does not say so, marks in reasoning are reasoning.
    assert len(read(format_named("hermes", reasoning=THINK), f"<think>{two_calls('hermes')}")) == 1


@pytest.mark.parametrize("marks", KNOWN, ids=lambda marks: marks.start.strip())
def test_reasoning(marks: ReasoningMarks) -> None:
    format = format_named("hermes", reasoning=marks)
    block = f"hm\n <tool_call> {marks.start}\n{marks.end}\n\nYes. {marks.start}"
    expected = [Reasoning(f"hm\n <tool_call> {marks.start.rstrip()}"), Content(f"Yes. {marks.start}")]
    assert read(format, f"{marks.start}\n{block}") == expected
    assert read(format, block, prompt=f"<|assistant|>\n{marks.start}\n") == expected
    assert read(format, "\n No.", prompt=f"{marks.start}\n\n{marks.end}\n\n") == [Content("\n No.")]
    assert read(format, f"{marks.start}hm ") == [Reasoning("hm")]
    assert read(format, f"{marks.start}{marks.end} {two_calls('hermes')}") == read(format, two_calls("hermes"))


def test_channels() -> None:
    format = format_named("harmony")
    text = (
        "<|channel|>analysis<|message|>hm {}<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
        + two_calls("harmony")
    )
    calls = [call("weather", city=CITY, days=2), call("now")]
    expected = [("Reasoning", "hm {}"), ("Content", "Let me see."), *calls]
    assert flat(read(format, text)) == flat(read(format, text, list(range(len(text))))) == expected
    assert flat(read(format, " to=functions.now<|channel|>commentary json<|message|>{}")) == [call("now")]
    assert read(format, "<|channel|>final<|message|>Hi\n\n<|return|>") == [Content("Hi\n\n")]
    prompt = "<|start|>assistant<|channel|>analysis<|message|>"
    rest = "hm<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    assert read(format, rest, prompt=prompt) == [Reasoning("hm"), Content("Hi")]
    for lost in ("Hi there", "a <b <|channel|>", "<|channel|>commentary to=functions.later<|message|>{}", "<|x|>"):
        assert "".join(d.text for d in read(format, lost) if isinstance(d, Content)) == lost


def test_a_long_text_takes_linear_time() -> None:
    for name in NAMES:
        for unit in ("{", "[", "\n", '<tool_call>{"name": "now", ', "<|channel|>", "[TOOL_CALLS]now", "word "):
            text = unit * (40_000 // len(unit))
            begun = time.process_time()
            read(format_named(name, reasoning=THINK), text)
            assert time.process_time() - begun < 2, (name, unit)


def test_ids() -> None:
    assert len({call_id() for _ in range(100)}) == 100
    assert re.fullmatch("call_[0-9A-Za-z]{24}", call_id())
    mistral, short = format_named("mistral"), format_named("mistral").template_id("call_x")
    assert re.fullmatch("[0-9A-Za-z]{9}", short) and short == mistral.template_id("call_x")
    assert mistral.template_id("a1B2c3D4e") == "a1B2c3D4e" and mistral.template_id("call_y") != short
    assert format_named("hermes").template_id("call_x") == "call_x"


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([{"type": "function"}], "required", "without; give function.name"),
        ([{"name": "a", "parameters": 1}], "required", "JSON Schema as parameters of the tool 'a', found 1"),
        ([{"name": "a"}, {"name": "a"}], "required", "different names, found 'a' twice"),
        ([], "required", "at least one tool"),
        (TOOLS, "auto", "found 'auto'"),
        (TOOLS, {"type": "function", "function": {"name": "later"}}, r"\(weather, plot, now\), found 'later'"),
    ],
)
def test_wrong_tools_are_refused(tools: list[dict[str, object]], choice: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        format_named("hermes").grammar(tools, choice)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "schema",
    [
        {"minLength": "x", "type": "string"},
        {"type": "array", "minItems": []},
        {"anyOf": 3},
        {"enum": 3},
        {"enum": [{1}]},
        {"type": {}},
        True,
        7,
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_schemas_without_sense_are_the_clients_fault(name: str, schema: object) -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": schema}, "required": 3}}
    try:
        assert isinstance(format_named(name).grammar([tool]), str)  # or llguidance refuses it
    except UserError as error:
        assert "JSON Schema as parameters" in str(error)


@pytest.mark.parametrize(
    ("name", "key"),
    [("python", "a b"), ("olmo3", "f(x"), ("qwen3-coder", "a<b"), ("glm4.7", "a\nb"), ("gemma4", "a:b")],
)
def test_names_that_a_format_cannot_write_are_refused(name: str, key: str) -> None:
    tool = {"name": "f", "parameters": {"properties": {key: {"type": "integer"}}}}
    with pytest.raises(UserError, match="rename it"):
        format_named(name).grammar([tool])


def test_a_schema_that_holds_itself() -> None:
    node = {"type": "object", "properties": {k: {"$ref": "#/$defs/Node"} for k in "ab"}, "additionalProperties": False}
    schema = {"type": "object", "$defs": {"Node": node}, "properties": {"n": node}, "required": ["n"]}
    for name in NAMES:
        grammar = format_named(name).grammar([{"name": "f", "parameters": schema}], parallel=False)
        ids = sample(byte_tokenizer(), grammar, random.Random(0), ENDS)
        text = byte_tokenizer().decode(ids)
        deltas = flat(read(format_named(name), text, tools=[{"name": "f"}]))
        ((_, arguments),) = (found for found in deltas if found[0] == "f")
        Draft202012Validator(schema).validate(json.loads(arguments))


def sample(tokenizer: ModelTokenizer, grammar: str, rng: random.Random, ends: list[str]) -> list[int]:
    """Tokens that the grammar allows, drawn evenly, with some of the ``ends`` where they may come."""
    library = llguidance.LLTokenizer(
        tokenizer.tokenizer.to_str(), eos_token=tokenizer.tokenizer.token_to_id(END_OF_TEXT)
    )
    matcher = llguidance.LLMatcher(library, grammar)
    assert not matcher.is_error(), matcher.get_error()
    size = tokenizer.tokenizer.get_vocab_size()
    mask = llguidance.numpy.allocate_token_bitmask(1, size)
    found: list[int] = []
    while not matcher.is_stopped() and not (matcher.is_accepting() and rng.random() < 0.5):
        assert len(found) < 4000
        end = tokenizer.encode(rng.choice(ends)) if rng.random() < 0.05 else []
        if not end or matcher.validate_tokens(end) < len(end):
            llguidance.numpy.fill_next_token_bitmask(matcher, mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size])
            end = [int(rng.choice(list(allowed)))]
        if end == [library.eos_token]:
            break
        assert matcher.try_consume_tokens(end) == len(end), matcher.get_error()
        found += end
    return found


ENDS = ['"', "}", '"}', "</parameter>", "\n</parameter>", "</arg_value>", "<escape>", '<|"|>', "<|end|>", "</think>"]


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_grammar_allows_is_read_back(name: str, special: bool) -> None:
    kind = format_named(name)
    reasoning = kind.reasoning or THINK
    marks = [*kind.marks, "<think>", "</think>"] if special else []
    tokenizer = byte_tokenizer(marks)
    tokens = {mark: tokenizer.tokenizer.token_to_id(mark) for mark in marks}
    format = format_named(name, tokens=tokens, special=frozenset(marks), reasoning=reasoning)
    assert format.keep_special == special
    rng = random.Random(name)
    counts, names = [], set()
    for number in range(5):
        named = {"type": "function", "function": {"name": ("weather", "plot", "now")[number % 3]}}
        choice, parallel = ("required", number != 1) if number < 2 else (named, True)
        prompt = reasoning.start if number == 3 else ""
        grammar = format.grammar(TOOLS, choice, parallel, prompt)  # type: ignore[arg-type]
        ids = sample(tokenizer, grammar, rng, ENDS)
        stream = tokenizer.stream(keep_special=format.keep_special)
        text = "".join(map(stream.add, ids)) + stream.finish()
        deltas = read(format, text, list(range(len(text))), prompt=prompt)
        assert deltas == read(format, text, eager=True, prompt=prompt)
        calls = [(n, json.loads(found)) for n, found in flat(deltas) if n != "Reasoning"]
        assert calls and all(n in PARAMETERS for n, _ in calls), text
        for n, arguments in calls:
            Draft202012Validator(PARAMETERS[n]).validate(arguments)
        if number:
            assert len(calls) == 1
        if number >= 2:
            assert calls[0][0] == named["function"]["name"]  # type: ignore[index]
        counts.append(len(calls))
        names |= {n for n, _ in calls}
    assert names == set(PARAMETERS)


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "text"])
@pytest.mark.parametrize("name", ["hermes", "harmony"])
def test_an_answer_after_reasoning_may_have_a_grammar(name: str, special: bool) -> None:
    """How the server writes ``response_format`` for models that reason."""
    marks = [*format_named(name).marks, "<think>", "</think>"] if special else []
    tokenizer = byte_tokenizer(marks)
    tokens = {mark: tokenizer.tokenizer.token_to_id(mark) for mark in marks}
    reasoning = format_named(name).reasoning or THINK
    answer = None if name == "harmony" else ANSWERS[3]
    format = format_named(name, tokens=tokens, reasoning=reasoning, answer=answer)
    kinds = set()
    for number, prompt in enumerate(["", "", "", reasoning.start]):
        lark = Lark(tokens)
        before = format.before_answer(lark, prompt)
        ids = sample(tokenizer, lark.start(before + lark.json(PARAMETERS["weather"])), random.Random(number), ENDS)
        *thoughts, answer = read(format, tokenizer.decode(ids, keep_special=True), tools=[], prompt=prompt)
        assert isinstance(answer, Content) and all(isinstance(delta, Reasoning) for delta in thoughts)
        Draft202012Validator(PARAMETERS["weather"]).validate(json.loads(answer.text))
        kinds.add(len(thoughts))
    assert kinds == {0, 1}


def test_tools_in_words() -> None:
    text = describe_tools(TOOLS, "required")
    assert all(json.dumps(t.parameters) in text for t in read_tools(TOOLS)) and "at least one" in text
    assert "'now'" in describe_tools(TOOLS, {"function": {"name": "now"}})
    assert '"arguments": {"a parameter"' in describe_tools(TOOLS) and "one line of JSON per call" in describe_tools(
        TOOLS
    )
    told = describe_tools(TOOLS, format=format_named("deepseek-v3.1"))
    assert '<｜tool▁call▁begin｜>the tool<｜tool▁sep｜>{"a parameter": "its value"}' in told and "one line" not in told
