"""Completions, scores and embeddings against the model's own logits and states."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import openai
import pytest
from live_server import LiveServer

from tulle.serve.schemas.openai import Completion, Embeddings, Scores


def test_echo_and_logprobs_are_the_models(server: LiveServer) -> None:
    """Of every token of prompt and continuation, given as text or as tokens, streamed or not."""
    engine = server.engine
    prompt = engine.text.encode("def hello(name):")
    body = {"prompt": "def hello(name):", "max_tokens": 4, "echo": True, "logprobs": 2, "seed": 3, "temperature": 1.0}
    text = server.post("/v1/completions", body).json()
    Completion.model_validate(text)
    assert server.post("/v1/completions", body | {"prompt": prompt}).json()["choices"] == text["choices"]
    choice = text["choices"][0]
    given = choice["logprobs"]
    assert choice["text"].startswith("def hello(name):")
    assert "".join(given["tokens"]) == choice["text"]
    starts = zip(given["text_offset"], given["tokens"], strict=True)
    assert all(choice["text"].startswith(token, at) for at, token in starts)
    assert given["token_logprobs"][0] is None and given["top_logprobs"][0] is None
    tokens = engine.text.encode(choice["text"])
    assert tokens[: len(prompt)] == prompt
    for number in range(1, len(prompt)):
        expected = engine.log_softmax(prompt[:number])
        assert given["token_logprobs"][number] == pytest.approx(expected[prompt[number]], abs=1e-5)
        assert max(given["top_logprobs"][number].values()) == pytest.approx(expected.max(), abs=1e-5)
    parts: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    joined = ""
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])["choices"][0]
                joined += piece["text"]
                for name in parts:
                    parts[name] += piece["logprobs"][name]
    assert (joined, parts) == (choice["text"], given)


def test_prompt_alone(server: LiveServer) -> None:
    """What evaluations ask: no token is generated."""
    tokens = server.engine.text.encode("import os")
    found = server.post("/v1/completions", {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 1}).json()
    choice = found["choices"][0]
    assert choice["text"] == "import os" and len(choice["logprobs"]["tokens"]) == len(tokens)
    assert found["usage"]["completion_tokens"] == 0


def test_several_prompts_and_answers(client: openai.OpenAI, server: LiveServer) -> None:
    """The order is that of the prompts; equal seeds give equal texts, alone and together."""
    found = client.completions.create(model="demo", prompt=["a = 1", "b = 2"], n=2, max_tokens=5, seed=9)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    alone = client.completions.create(model="demo", prompt="b = 2", n=2, max_tokens=5, seed=9)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in found.choices[2:]]
    tokens = server.engine.text.encode("b = 2")
    same = client.completions.create(model="demo", prompt=[tokens, tokens], max_tokens=5, seed=9)
    assert [choice.text for choice in same.choices] == [alone.choices[0].text] * 2


def test_best_of_is_the_likeliest(server: LiveServer) -> None:
    body = {"prompt": "x", "max_tokens": 3, "seed": 11, "logprobs": 0}
    every = server.post("/v1/completions", body | {"n": 4}).json()["choices"]
    best = server.post("/v1/completions", body | {"n": 2, "best_of": 4}).json()["choices"]
    order = sorted(every, key=lambda choice: -float(np.mean(choice["logprobs"]["token_logprobs"])))
    assert [choice["text"] for choice in best] == [choice["text"] for choice in order[:2]]


def test_default_length_is_openais(server: LiveServer) -> None:
    assert (
        server.post("/v1/completions", {"prompt": "x", "ignore_eos": True}).json()["usage"]["completion_tokens"] == 16
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"suffix": "x"},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": [10**6]},
        {"prompt": [[1], "x"]},
        {"prompt": ["x"] * 300},
        {"prompt": [1] * 300},
        {"best_of": 1, "n": 2},
        {"best_of": 3, "stream": True},
        {"logprobs": 21},
        {"n": 32, "prompt": ["x"] * 8},
        {"response_format": {"type": "json_object"}, "grammar": 'start: "x"'},
    ],
)
def test_refused(server: LiveServer, wrong: dict[str, Any]) -> None:
    found = server.post("/v1/completions", {"prompt": "x"} | wrong)
    assert found.status_code == 400 and found.json()["error"]["message"].startswith("expected")


def test_scores_are_the_models(server: LiveServer) -> None:
    """Sums of log-softmax over the continuation's tokens, however prompt and continuation are given."""
    engine = server.engine
    prompt, ends = "The answer is ", ["42.", "not known"]
    body = {"prompt": prompt, "continuations": ends}
    found = server.post("/v1/score", body).json()
    Scores.model_validate(found)
    before = engine.text.encode(prompt.rstrip())
    for end, score in zip(ends, found["data"], strict=True):
        tokens = engine.text.encode(prompt + end)
        rows = [engine.log_softmax(tokens[:at]) for at in range(len(before), len(tokens))]
        expected = [float(row[token]) for row, token in zip(rows, tokens[len(before) :], strict=True)]
        assert score["tokens"] == tokens[len(before) :]
        assert score["token_logprobs"] == pytest.approx(expected, abs=1e-5)
        assert score["logprob"] == pytest.approx(sum(expected), abs=1e-4)
    likeliest = [int(engine.log_softmax(before).argmax())]
    greedy = server.post("/v1/score", {"prompt": before, "continuations": [likeliest, [1, 2]]}).json()["data"]
    assert [score["greedy"] for score in greedy] == [True, False]
    assert server.post("/v1/score", {"prompt": "x", "continuations": [""]}).status_code == 400


def test_embeddings_are_the_models(client: openai.OpenAI, server: LiveServer) -> None:
    engine = server.engine
    texts = ["One sentence of some length.", "Another"]
    found = client.embeddings.create(model="demo", input=texts)  # in base64, as the client asks
    assert [row.index for row in found.data] == [0, 1]
    for text, row in zip(texts, found.data, strict=True):
        tokens = engine.text.encode(text)
        states = np.array([engine.model.hidden(tokens[: n + 1]) for n in range(len(tokens))], np.float64)
        mean, last = states.mean(0), states[-1]
        assert row.embedding == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=1e-6)
        body = {"input": tokens, "pooling": "last", "normalize": False, "encoding_format": "float"}
        plain = server.post("/v1/embeddings", body).json()
        Embeddings.model_validate(plain)
        assert plain["data"][0]["embedding"] == pytest.approx(last.tolist(), abs=1e-6)
        coded = server.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
        assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == plain["data"][0]["embedding"]
    assert server.post("/v1/embeddings", {"input": "x", "dimensions": 8}).status_code == 200
    assert server.post("/v1/embeddings", {"input": "x", "dimensions": 4}).json()["error"]["param"] == "dimensions"


def test_tokens_there_and_back(server: LiveServer) -> None:
    text = "if x > 1:\n    print('ä')"
    found = server.post("/tokenize", {"content": text, "with_pieces": True}).json()
    assert found["tokens"] == server.engine.text.encode(text, special=False) and found["count"] == len(found["tokens"])
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"content": text}
    assert any(piece.startswith("bytes:\\x") for piece in found["pieces"]) or "ä" in "".join(found["pieces"])
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400
