"""Calls of tools, reasoning and forced formats, in all three APIs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from live_server import TEMPLATE, LiveServer, demo_folder

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": PARAMETERS}}
ASKED: Any = [{"role": "user", "content": "Weather in Ulm?"}]
CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def test_chat_calls(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.say(CALL)
    whole = client.chat.completions.create(model="demo", messages=ASKED, tools=[TOOL], temperature=0).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "Let me see."
    call: Any = whole.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Ulm"})
    text, name, arguments, reason = "", "", "", None
    for chunk in client.chat.completions.create(model="demo", messages=ASKED, tools=[TOOL], temperature=0, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for part in delta.tool_calls or ():
            assert part.index == 0
            name += part.function.name or ""
            arguments += part.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (text, name, json.loads(arguments), reason) == ("Let me see.", "weather", {"city": "Ulm"}, "tool_calls")
    # Without tools, or with tool_choice none, the same text is text.
    for more in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        plain = client.chat.completions.create(model="demo", messages=ASKED, temperature=0, **more).choices[0]
        assert plain.finish_reason == "stop" and "<tool_call>" in plain.message.content


def test_conversation_with_results(server: LiveServer) -> None:
    """A call and its result come back into the prompt, in every API's form alike."""
    function = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    call = {"id": "c1", "type": "function", "function": function}
    chat = {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        "tools": [TOOL],
    }
    tokens = server.post("/tokenize", chat).json()["tokens"]
    text = server.engine.text.decode(tokens)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in text and "rain" in text
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}}
    claude = {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]},
        ],
        "tools": [{"name": "weather", "description": "Tells.", "input_schema": PARAMETERS}],
    }
    assert server.post("/v1/messages/count_tokens", claude).json() == {"input_tokens": len(tokens)}
    responses = {
        "input": [
            *ASKED,
            {"type": "function_call", "call_id": "c1", **function},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
        "tools": [{"type": "function", **TOOL["function"]}],
        "max_output_tokens": 1,
    }
    assert server.post("/v1/responses", responses).json()["usage"]["input_tokens"] == len(tokens)


def test_anthropic_calls(claude: anthropic.Anthropic, server: LiveServer) -> None:
    server.engine.say(CALL)
    tools: Any = [{"name": "weather", "description": "Tells.", "input_schema": PARAMETERS}]
    asked: Any = {"model": "demo", "max_tokens": 100, "messages": ASKED, "tools": tools}
    whole = claude.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    assert [block.type for block in whole.content] == ["text", "tool_use"]
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for one in (whole, streamed):
        text, use = one.content
        assert (text.text, use.name, use.input) == ("Let me see.", "weather", {"city": "Ulm"})
    assert streamed.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == (
        streamed.usage.input_tokens + streamed.usage.cache_read_input_tokens
    )


def test_responses_calls(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.say(CALL)
    tools: Any = [{"type": "function", "name": "weather", "description": "Tells.", "parameters": PARAMETERS}]
    asked: Any = {"model": "demo", "input": "Weather in Ulm?", "tools": tools, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.status == "completed" and whole.output_text == "Let me see."
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    for one in (whole, last.response):
        message, call = one.output
        assert (message.type, call.type) == ("message", "function_call")
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Ulm"})
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert (text, json.loads(arguments)) == ("Let me see.", {"city": "Ulm"})
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == "Let me see."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come(client: openai.OpenAI, choice: Any) -> None:
    """A model that speaks by chance makes a valid call all the same."""
    hot = {"properties": {"hot": {"type": "boolean"}}, "required": ["hot"]}
    schema = {"type": "object", "additionalProperties": False, **hot}
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    found = client.chat.completions.create(
        model="demo",
        messages=ASKED,
        tools=[tool],
        tool_choice=choice,
        seed=2,
        parallel_tool_calls=False,
    ).choices[0]
    assert found.finish_reason == "tool_calls" and not found.message.content
    (call,) = found.message.tool_calls
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"hot"}


def test_an_answer_by_schema(client: openai.OpenAI, server: LiveServer) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
        "required": ["kind", "old"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    found = client.chat.completions.create(model="demo", messages=ASKED, response_format=form, seed=1, max_tokens=60)
    content = json.loads(found.choices[0].message.content)
    assert content["kind"] in ("cat", "dog") and isinstance(content["old"], bool)
    assert found.choices[0].finish_reason == "stop"
    response = client.responses.create(
        model="demo", input="x", text={"format": {"type": "json_schema", "name": "pet", "schema": schema}}
    )
    assert json.loads(response.output_text)["kind"] in ("cat", "dog")
    body = {"prompt": "x", "max_tokens": 60, "seed": 3}
    digits = server.post("/v1/completions", body | {"regex": "[0-9]{3}-[0-9]{2}"}).json()["choices"][0]
    assert len(digits["text"]) == 6 and digits["text"][3] == "-" and digits["finish_reason"] == "stop"
    yes = server.post("/v1/completions", body | {"grammar": 'start: "yes" | "no"'}).json()["choices"][0]["text"]
    assert yes in ("yes", "no")
    gbnf = server.post("/v1/completions", body | {"grammar": 'root ::= "yes" | "no"'}).json()["choices"][0]["text"]
    assert gbnf in ("yes", "no")
    whole = server.post("/v1/completions", body | {"response_format": form})
    assert set(json.loads(whole.json()["choices"][0]["text"])) == {"kind", "old"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"grammar": "start: ("},
        {"regex": "("},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        {"grammar": 'start: "x"', "regex": "x"},
        {"tools": [TOOL, TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "absent"}}},
        {"tools": [{"type": "web_search"}]},
    ],
)
def test_refused(server: LiveServer, wrong: dict[str, Any]) -> None:
    found = server.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 5} | wrong)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["message"].startswith("expected")


@pytest.mark.parametrize("include", [5, "x", [5], [None], ["x"] * 40, {"a": 1}])
def test_what_a_response_may_include_is_a_list_of_names(server: LiveServer, include: object) -> None:
    """A number raised a raw error (found by the fuzzer)."""
    found = server.post("/v1/responses", {"input": "x", "include": include})
    assert found.status_code == 400 and "include" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "a{1000000}"},
        {"regex": "(a{1,1000}){1,1000}{1,1000}"},
        {"regex": "(.*a){1,2000}b{1000}"},
        {"regex": "(x+x+)+y"},
        {"grammar": "\n".join(["start: a0", *(f"a{n}: a{n + 1} a{n + 1}" for n in range(40)), 'a40: "x"'])},
        {"grammar": 'start: a\na: a a a a | "x" | ""'},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"pattern": "^(a+)+$", "minLength": 10**6}},
            }
        },
    ],
    ids=range(8),
)
def test_hostile_grammars(server: LiveServer, grammar: dict[str, Any]) -> None:
    """Followed or refused, within a second."""
    begun = time.process_time()
    found = server.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 5} | grammar)
    assert found.status_code in (200, 400), found.text
    assert time.process_time() - begun < 1


def test_anthropic_stops_and_errors(claude: anthropic.Anthropic, server: LiveServer) -> None:
    server.engine.say("One two three.")
    found = claude.messages.create(model="demo", max_tokens=50, messages=ASKED, stop_sequences=["absent", " three"])
    assert (found.content[0].text, found.stop_reason, found.stop_sequence) == ("One two", "stop_sequence", " three")
    short = claude.messages.create(model="demo", max_tokens=1, messages=ASKED, system="Be brief.")
    assert short.stop_reason == "max_tokens"
    with pytest.raises(anthropic.NotFoundError) as absent:
        claude.messages.create(model="other", max_tokens=1, messages=ASKED)
    assert absent.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as wrong:
        image: Any = {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}
        claude.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": [image]}])
    assert "text alone" in wrong.value.body["error"]["message"]
    prefill: Any = [*ASKED, {"role": "assistant", "content": "It"}]
    with pytest.raises(anthropic.BadRequestError, match="prefill"):
        claude.messages.create(model="demo", max_tokens=1, messages=prefill)


def test_reasoning(tmp_path: Path) -> None:
    """Comes apart in every API, streamed or not; a format of the answer holds for what follows it."""
    folder = demo_folder(tmp_path / "demo", TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}")
    server = LiveServer(folder)
    try:
        server.engine.say("<think>\nHm, well.\n</think>\n\nRain.")
        body = {"messages": ASKED, "temperature": 0}
        found = server.post("/v1/chat/completions", body).json()
        message = found["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm, well.", "Rain.")
        assert 3 < found["usage"]["completion_tokens_details"]["reasoning_tokens"] < found["usage"]["completion_tokens"]
        thoughts, text = "", ""
        with server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    thoughts += delta.get("reasoning_content", "")
                    text += delta.get("content", "")
        assert (thoughts, text) == ("Hm, well.", "Rain.")
        claude = server.post("/v1/messages", body | {"max_tokens": 50}).json()
        assert [block["type"] for block in claude["content"]] == ["thinking", "text"]
        responses = server.post("/v1/responses", {"input": "x", "temperature": 0}).json()
        assert [item["type"] for item in responses["output"]] == ["reasoning", "message"]
        assert responses["usage"]["output_tokens_details"]["reasoning_tokens"] > 3
        for more in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            prompt = server.post("/v1/chat/completions", body | more).json()["usage"]["prompt_tokens"]
            assert prompt > found["usage"]["prompt_tokens"]
        server.engine.say("")
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"schema": schema | {"additionalProperties": False}}}
        answered = server.post("/v1/chat/completions", body | {"response_format": form, "seed": 1}).json()
        assert set(json.loads(answered["choices"][0]["message"]["content"])) == {"a"}
    finally:
        server.close()


COMMAND = (
    "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    '{{ m.content }}{% for c in m.tool_calls or [] %}<|START_ACTION|>[{{ \'{"tool_call_id": "0", "tool_name": "\' }}'
    "{{ c.function.name }}{{ '\", \"parameters\": ' ~ (c.function.arguments | tojson) ~ '}' }}]<|END_ACTION|>"
    "{% endfor %}\n{% endfor %}<|assistant|>{% if thinking %}<|START_THINKING|>{% endif %}"
    "{# <|END_THINKING|><|START_RESPONSE|><|END_RESPONSE|> #}"
)


def test_a_family_with_marks_around_everything(tmp_path: Path) -> None:
    """Thoughts that the prompt opens, calls and the answer come apart in every API, streamed or not."""
    server = LiveServer(demo_folder(tmp_path / "demo", COMMAND))
    try:
        body: dict[str, Any] = {"messages": ASKED, "temperature": 0, "tools": [TOOL]}
        opened = {"chat_template_kwargs": {"thinking": True}}

        def streamed(more: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = {"content": "", "reasoning_content": "", "ids": [], "arguments": []}
            with server.http.stream("POST", "/v1/chat/completions", json=body | more | {"stream": True}) as response:
                for line in response.iter_lines():
                    delta = json.loads(line[6:])["choices"][0]["delta"] if line.startswith("data: {") else {}
                    for key in ("content", "reasoning_content"):
                        found[key] += delta.get(key, "")
                    for call in delta.get("tool_calls", ()):
                        found["ids"] += [call["id"]] if "id" in call else []
                        found["arguments"] += [""] if "id" in call else []
                        found["arguments"][call["index"]] += call["function"]["arguments"]
            return found

        server.engine.say("Hm.<|END_THINKING|><|START_RESPONSE|>Rain.<|END_RESPONSE|>")
        found = streamed(opened)
        assert (found["reasoning_content"], found["content"], found["ids"]) == ("Hm.", "Rain.", [])
        message = server.post("/v1/chat/completions", body | opened).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Rain.")
        message = server.post("/v1/chat/completions", {"messages": ASKED, "temperature": 0} | opened).json()
        assert message["choices"][0]["message"]["content"] == "Rain."
        use = '{"tool_name": "weather", "parameters": {"city": "%s"}}'
        server.engine.say(f"Hm.<|END_THINKING|><|START_ACTION|>[{use % 'Ulm'}, {use % 'Bonn'}]<|END_ACTION|>")
        found = streamed(opened)
        assert (found["reasoning_content"], found["content"]) == ("Hm.", "") and len(set(found["ids"])) == 2
        assert [json.loads(text)["city"] for text in found["arguments"]] == ["Ulm", "Bonn"]
        tools = [{"name": "weather", "input_schema": PARAMETERS}]
        asked = {"messages": ASKED, "temperature": 0, "max_tokens": 200, "tools": tools}
        claude = server.post("/v1/messages", asked | {"thinking": {"type": "enabled", "budget_tokens": 1024}}).json()
        assert [block["type"] for block in claude["content"]] == ["thinking", "tool_use", "tool_use"]
        tools = [{"type": "function", **TOOL["function"]}]
        asked = {"input": "x", "temperature": 0, "tools": tools, "reasoning": {"effort": "high"}}
        responses = server.post("/v1/responses", asked).json()
        assert [item["type"] for item in responses["output"]] == ["reasoning", "function_call", "function_call"]
    finally:
        server.close()
