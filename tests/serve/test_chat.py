"""Chat completions, by OpenAI's client and raw."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from live_server import LiveServer

from tulle.serve.schemas.openai import ChatCompletion

HELLO = [{"role": "user", "content": "Say something."}]


def test_streams_what_it_answers(client: openai.OpenAI) -> None:
    """Texts, finish reasons and counts of a stream are those of the whole answer; so is every one of n answers."""
    asked: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 12, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts = ["", "", ""]
    reasons: dict[int, str] = {}
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert reasons == {0: "length", 1: "length", 2: "length"}
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 36
    for number in range(3):
        alone = client.chat.completions.create(**asked | {"n": 1, "seed": 5 + number})
        assert alone.choices[0].message.content == texts[number]


def test_prefix_is_reused(client: openai.OpenAI, server: LiveServer) -> None:
    messages = [{"role": "system", "content": "You are brief. " * 8}, {"role": "user", "content": "Hello?"}]
    first = client.chat.completions.create(model="demo", messages=messages, max_tokens=2)
    again = client.chat.completions.create(model="demo", messages=messages, max_tokens=2)
    assert first.usage.prompt_tokens == again.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens - 17
    assert server.metric("tulle_cached_tokens_total") >= again.usage.prompt_tokens - 17


def test_logprobs_are_the_models(server: LiveServer) -> None:
    """Equal to the log-softmax of the model's logits, whatever temperature and penalties do."""
    body = {"messages": HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 3, "temperature": 1.7, "seed": 1}
    found = server.post("/v1/chat/completions", body).json()
    tokens = server.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    streamed = []
    with server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                streamed += (choice["logprobs"] or {"content": []})["content"]
    listed = found["choices"][0]["logprobs"]["content"]
    assert streamed == listed and len(listed) == 6
    vocabulary = server.engine.text.tokenizer.get_vocab()
    assert "".join(bytes(entry["bytes"]).decode("utf-8", "replace") for entry in listed).strip()
    for entry in listed:
        expected = server.engine.log_softmax(tokens)
        top = sorted(range(len(expected)), key=lambda i: -expected[i])[:3]
        assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(
            [expected[i] for i in top], abs=1e-5
        )
        chosen = min(range(len(expected)), key=lambda i: abs(expected[i] - entry["logprob"]))
        assert entry["logprob"] == pytest.approx(expected[chosen], abs=1e-5)
        assert server.registry.loaded()[0].tokens.text(chosen) == entry["token"]
        assert chosen in vocabulary.values()
        tokens = [*tokens, chosen]


def test_stop_and_end(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.say("One two three. Four.")
    asked: dict[str, Any] = {"model": "demo", "messages": HELLO, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("One two three. Four.", "stop")
    cut = client.chat.completions.create(**asked, stop=["absent", " three"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("One two", "stop")
    streamed = client.chat.completions.create(**asked, stop=" three", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "One two"


def test_answer_has_the_documented_shape(server: LiveServer) -> None:
    found = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, "logprobs": True})
    ChatCompletion.model_validate(found.json())
    assert found.headers["x-request-id"]


def test_messages_as_clients_send_them(server: LiveServer) -> None:
    """Parts are joined; what clients add is no error."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "assistant", "content": "c", "annotations": [], "audio": None},
        {"role": "user", "content": "d"},
    ]
    found = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert (
        server.engine.text.decode(found)
        == "<|developer|>Be brief.\n<|user|>a\nb\n<|assistant|>c\n<|user|>d\n<|assistant|>"
    )
    body = {"messages": messages, "max_tokens": 1, "user": "me", "metadata": {"a": "b"}, "store": True, "top_k": -1}
    assert server.post("/v1/chat/completions", body | {"top_p": 0, "service_tier": "auto"}).status_code == 200


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 33}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias.1"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": []}, "functions"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"seed": -1}, "seed"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_refuses_by_name(server: LiveServer, wrong: dict[str, Any], param: str | None) -> None:
    found = server.post("/v1/chat/completions", {"messages": HELLO} | wrong)
    error = found.json()["error"]
    assert found.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"].startswith("expected") and "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="expected a model of demo, found 'other'"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "long " * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_max_tokens_ends_at_the_context(server: LiveServer) -> None:
    found = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 100_000, "ignore_eos": True}).json()
    assert found["usage"]["total_tokens"] == 256
    assert found["choices"][0]["finish_reason"] == "length"


def test_variables_of_the_template(server: LiveServer) -> None:
    body: dict[str, Any] = {"messages": HELLO, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body | {"chat_template_kwargs": {"x": 1}}).status_code == 200
    for name in ("messages", "eos_token", "add_generation_prompt", "tools"):
        refused = server.post("/v1/chat/completions", body | {"chat_template_kwargs": {name: "x"}})
        assert refused.status_code == 400, name
