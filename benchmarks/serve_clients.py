"""Other people's clients against ``tulle serve``: LangChain, LiteLLM and lm-eval's local-completions.

    python -m venv build/clients
    build/clients/bin/pip install langchain-openai langchain-anthropic litellm 'lm-eval[api]' transformers
    tulle serve MODEL --port 8080
    build/clients/bin/python benchmarks/serve_clients.py --model MODEL --port 8080

Each check prints one line. lm-eval's log-likelihoods are compared with ``/v1/score``. Exit code 1 where one fails; a
client that is not installed is said to be so. MODEL is a folder with a chat template; lm-eval reads its tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAID = "Say hello in one short sentence."
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a banana"),
    ("def add(a, b):\n    return a", " + b"),
    ("One, two, three,", " four"),
]


class Server:
    """Where it is, and what its model is called."""

    def __init__(self, folder: str, port: int):
        self.folder, self.model, self.origin = folder, Path(folder).name, f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        content = json.dumps(body).encode()
        request = urllib.request.Request(self.origin + path, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)


def langchain_openai(server: Server) -> str:
    """Invoke, stream, structured output and a call that must come."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model=server.model, base_url=f"{server.origin}/v1", api_key="none", temperature=0, max_tokens=24)
    whole = chat.invoke(SAID)
    streamed = "".join(str(chunk.content) for chunk in chat.stream(SAID))
    assert whole.content == streamed, (whole.content, streamed)
    schema: dict[str, Any] = {
        "title": "pet",
        "type": "object",
        "properties": {"old": {"type": "boolean"}},
        "required": ["old"],
    }
    schema["additionalProperties"] = False
    found = chat.with_structured_output(schema, method="json_schema").invoke("A cat of 20 years.")
    assert isinstance(found["old"], bool), found
    tool = {"title": "weather", "description": "Tells.", "type": "object", "properties": {"city": {"type": "string"}}}
    bound = chat.bind_tools([tool | {"required": ["city"]}], tool_choice="required")
    call = bound.bind(max_tokens=100).invoke("Weather in Ulm?").tool_calls[0]
    assert call["name"] == "weather" and isinstance(call["args"]["city"], str), call
    embeddings = OpenAIEmbeddings(
        model=server.model, base_url=f"{server.origin}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_documents(["a", "b"])) == 2
    return f"{whole.content!r}"


def langchain_anthropic(server: Server) -> str:
    from langchain_anthropic import ChatAnthropic

    chat = ChatAnthropic(model=server.model, base_url=server.origin, api_key="none", temperature=0, max_tokens=24)
    whole = chat.invoke(SAID)
    streamed = "".join(chunk.text if isinstance(chunk.text, str) else chunk.text() for chunk in chat.stream(SAID))
    text = whole.text if isinstance(whole.text, str) else whole.text()
    assert text == streamed, (text, streamed)
    return f"{text!r}"


def litellm(server: Server) -> str:
    """Its OpenAI-compatible provider: whole, streamed, text completion, embedding."""
    import litellm as library

    asked = {"api_base": f"{server.origin}/v1", "api_key": "none", "max_tokens": 24, "temperature": 0}
    messages = [{"role": "user", "content": SAID}]
    whole = library.completion(model=f"openai/{server.model}", messages=messages, **asked)
    stream = library.completion(model=f"openai/{server.model}", messages=messages, stream=True, **asked)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    text = whole.choices[0].message.content
    assert text == streamed, (text, streamed)
    plain = library.text_completion(model=f"text-completion-openai/{server.model}", prompt="One, two,", **asked)
    assert plain.choices[0].text
    vectors = library.embedding(
        model=f"openai/{server.model}", input=["a"], api_base=f"{server.origin}/v1", api_key="none"
    )
    assert len(vectors.data) == 1
    return f"{text!r}"


def lm_eval(server: Server) -> str:
    """Log-likelihoods of a few pairs through local-completions, beside ``/v1/score``."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{server.origin}/v1/completions",
        model=server.model,
        tokenizer_backend="huggingface",
        tokenizer=server.folder,
        num_concurrent=2,
        max_length=512,
    )
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    found = model.loglikelihood(requests)
    worst = 0.0
    for (prompt, end), (likelihood, greedy) in zip(PAIRS, found, strict=True):
        score = server.post("/v1/score", {"model": server.model, "prompt": prompt, "continuations": [end]})["data"][0]
        worst = max(worst, abs(score["logprob"] - likelihood))
        assert greedy == score["greedy"], (prompt, end, found, score)
    assert worst < 1e-2, worst
    return f"{len(PAIRS)} pairs, at most {worst:.1e} from /v1/score"


CHECKS: dict[str, tuple[str, Callable[[Server], str]]] = {
    "LangChain, OpenAI": ("langchain_openai", langchain_openai),
    "LangChain, Anthropic": ("langchain_anthropic", langchain_anthropic),
    "LiteLLM": ("litellm", litellm),
    "lm-eval, local-completions": ("lm_eval", lm_eval),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder that is served")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    server, failed = Server(options.model, options.port), False
    for name, (package, check) in CHECKS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not installed")
            continue
        try:
            print(f"{name}: {check(server)}", flush=True)
        except Exception:  # whatever another library raises is a line of the report
            failed = True
            print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
