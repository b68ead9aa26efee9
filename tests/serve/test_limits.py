"""What must not happen: bodies that cost time or memory, clients that go away or do not read, a queue without end."""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from live_server import LiveServer

import tulle.serve.streaming as streaming
import tulle.serve.worker as worker
from tulle.errors import UserError
from tulle.serve.security import DEPTH, Keys, parse_json, read_keys

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/score", "/tokenize"]
SMALL = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"temperature": Infinity}',
    b'{"messages": "\\ud800"}', b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
]  # fmt: skip
LARGE = [
    (CHAT, b"[" * 4_000_000),
    (CHAT, b'{"x": "' + b'\\"' * 3_000_000),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "stop": [' + b'"x",' * 9_999 + b'"x"]}'),
    (CHAT, b'{"logit_bias": {' + b",".join(b'"%d": "x"' % n for n in range(400_000)) + b"}}"),
    (CHAT, b'{"messages": [' + b"{}," * 2_000_000 + b"{}]}"),
    (CHAT, b'{"messages": [{"role": "user", "content": "' + b"x" * 7_000_000 + b'"}]}'),
    ("/v1/completions", b'{"prompt": [' + b'"x",' * 1_500_000 + b"1]}"),
    ("/v1/completions", b'{"prompt": [' + b"1," * 3_000_000 + b"1]}"),
    ("/v1/embeddings", b'{"input": [' + b"-1," * 2_000_000 + b"1]}"),
    ("/v1/responses", b'{"input": "x", "metadata": {' + b",".join(b'"%d": 1' % n for n in range(400_000)) + b"}}"),
    ("/v1/messages", b'{"max_tokens": 1, "messages": [' + b'{"role": 1, "content": []},' * 200_000 + b"1]}"),
]


@pytest.mark.parametrize("path", PATHS)
def test_bad_bodies(server: LiveServer, path: str) -> None:
    """4xx, in the API's shape."""
    for body in SMALL:
        refused(server, path, body)


@pytest.mark.parametrize(("path", "body"), LARGE, ids=range(len(LARGE)))
def test_bad_bodies_that_are_large(server: LiveServer, path: str, body: bytes) -> None:
    """Within a second, client and server together."""
    begun = time.process_time()  # of this process alone: the machine may be busy
    refused(server, path, body)
    assert time.process_time() - begun < 1


def refused(server: LiveServer, path: str, body: bytes) -> None:
    found = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert 400 <= found.status_code < 500, (path, body[:60], found.text)
    assert found.json()["error"]["message"].startswith("expected"), (path, body[:60], found.text)
    assert len(found.text) < 5000


def test_large_bodies_are_not_read(server: LiveServer) -> None:
    """100 MB: said in advance, or not said and sent in chunks."""
    begun = time.process_time()
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n")
        assert one.recv(1000).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        sent = 0
        try:
            for _ in range(100):
                one.sendall(chunk)
                sent += 1
        except OSError:
            pass
        assert sent < 50
    assert time.process_time() - begun < 1


def test_depth_is_counted_outside_of_strings() -> None:
    assert parse_json(b"[" * DEPTH + b"]" * DEPTH) is not None
    assert parse_json(json.dumps({"text": "[{" * 1000}).encode()) == {"text": "[{" * 1000}
    assert parse_json(b'["\\"[", "\\\\"]') == ['"[', "\\"]
    for deep in (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), b'{"a":"x","b":' + b'[{"c":' * 40 + b"1"):
        with pytest.raises(Exception, match="levels"):
            parse_json(deep)


def test_keys(own_server: Callable[..., LiveServer], tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-1\n\nsecret-2\n")
    server = own_server(api_key=["secret-0"], api_key_file=file)
    body = {"prompt": "x", "max_tokens": 1}
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/").status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        assert server.http.get(path).status_code == 401
    for headers in ({}, {"authorization": "Bearer secret"}, {"authorization": "secret-1"}, {"x-api-key": "secret-3"}):
        found = server.post("/v1/completions", body, **headers)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    for key in ("secret-0", "secret-1", "secret-2"):
        assert server.post("/v1/completions", body, authorization=f"Bearer {key}").status_code == 200
        assert server.post("/v1/completions", body, **{"x-api-key": key}).status_code == 200
    claude = server.post("/v1/messages", body)
    assert (claude.status_code, claude.json()["type"]) == (401, "error")
    assert claude.json()["error"]["type"] == "authentication_error"


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or real(a, b))
    assert Keys(["a", "b", "c"]).accepts(b"a") and len(compared) == 3
    assert not Keys(["a", "b", "c"]).accepts(b"d") and len(compared) == 6


@pytest.mark.parametrize("content", ["", "# none\n", "two words\n", "ä\n"])
def test_key_files_that_are_wrong(tmp_path: Any, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(UserError, match="expected"):
        read_keys([], file)
    with pytest.raises(UserError, match="expected a file"):
        read_keys([], tmp_path / "absent")


def test_hosts(server: LiveServer, own_server: Callable[..., LiveServer]) -> None:
    """A page elsewhere cannot reach a server on loopback by a name of its own."""
    for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:8", 200), ("evil.example", 403), ("", 403)):
        assert server.http.get("/health", headers={"host": host}).status_code == status, host
    other = own_server(allow_host=["serve.example"], cors=["https://page.example"])
    assert other.http.get("/health", headers={"host": "serve.example:80"}).status_code == 200
    assert (
        "access-control-allow-origin" not in server.http.get("/health", headers={"origin": "https://a.example"}).headers
    )
    allowed = other.http.get("/health", headers={"origin": "https://page.example"}).headers
    assert allowed["access-control-allow-origin"] == "https://page.example"


def test_not_found_and_methods(server: LiveServer) -> None:
    assert server.http.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert server.http.get(CHAT).status_code == 405 and "error" in server.http.get(CHAT).json()
    text = server.http.post(CHAT, content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    assert text.status_code == 400  # what a page of another origin may send without asking


def test_disconnect_cancels(server: LiveServer) -> None:
    """Within a step, whether the answer is streamed or not, runs or waits."""
    server.engine.model.delay = 0.02
    for stream in (True, False):
        body = HELLO | {"stream": stream, "ignore_eos": True, "seed": 1}
        ended = server.metric("tulle_sequences_finished_total") + 1
        with pytest.raises(httpx.ReadTimeout):
            # A stream's bytes come, but never its end.
            with server.http.stream("POST", CHAT, json=body, timeout=httpx.Timeout(5, read=0.3)) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if number > 4:
                        raise httpx.ReadTimeout("enough")
        steps = server.engine.scheduler.stats.steps
        server.wait(lambda ended=ended: server.metric("tulle_sequences_finished_total") == ended)
        # Those of the time until the server sees that the connection is closed, and one.
        assert server.engine.scheduler.stats.steps - steps < 20
    assert server.engine.scheduler.stats.finished.get("cancelled", 0) >= 2


def test_queue_is_bounded(own_server: Callable[..., LiveServer]) -> None:
    """Beyond it 503 with Retry-After; what waits and goes away makes room."""
    server = own_server(sequences=1, queue=2)
    server.engine.model.gate.clear()
    begun = threading.Barrier(4)
    results: list[int] = []

    def ask() -> None:
        begun.wait()
        results.append(server.post(CHAT, HELLO | {"max_tokens": 2}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    found = server.registry.loaded()[0].worker
    server.wait(lambda: found.live == 3)
    refused = server.post(CHAT, HELLO)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["code"] == "overloaded"
    assert server.post("/v1/messages", HELLO | {"max_tokens": 1}).json()["error"]["type"] == "overloaded_error"
    assert server.post(CHAT, HELLO | {"n": 4}).status_code == 400  # never fits
    server.engine.model.gate.set()
    for thread in threads:
        thread.join()
    assert results == [200, 200, 200]
    assert found.live == 0 and server.post(CHAT, HELLO | {"max_tokens": 1}).status_code == 200


def test_deadlines(server: LiveServer) -> None:
    server.engine.model.delay = 0.02
    body = HELLO | {"ignore_eos": True}
    for found in (
        server.post(CHAT, body | {"timeout": 0.3}),
        server.post(CHAT, body, **{"x-request-timeout": "0.3"}),
    ):
        choice = found.json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
        assert 0 < found.json()["usage"]["completion_tokens"] < 20
    server.engine.model.gate.clear()
    threading.Timer(0.4, server.engine.model.gate.set).start()
    none = server.post(CHAT, body | {"timeout": 0.1})
    assert none.status_code in (504, 200)
    assert server.post(CHAT, body, **{"x-request-timeout": "soon"}).status_code == 400


def test_slow_readers_are_given_up(own_server: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client does not take is bounded; then its sequence is cancelled."""
    monkeypatch.setattr(worker, "MOST_PENDING", 50)
    server = own_server(sequences=2, context=8192)
    body = json.dumps(HELLO | {"stream": True, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", server.port))
        one.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        server.wait(lambda: server.engine.scheduler.stats.generated_tokens > 0)
        server.wait(lambda: server.idle, 20)
    assert server.engine.scheduler.stats.finished == {"cancelled": 1}


def test_comments_while_nothing_comes(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE", 0.05)
    server.engine.model.gate.clear()
    threading.Timer(0.4, server.engine.model.gate.set).start()
    with server.http.stream("POST", CHAT, json=HELLO | {"stream": True, "max_tokens": 2}) as response:
        lines = list(response.iter_lines())
    assert 2 <= lines.count(": keep-alive") <= 10
    assert lines[-2] == "data: [DONE]"


def test_a_fault_of_the_engine(own_server: Callable[..., LiveServer]) -> None:
    """One request fails, as JSON or as the last event of a stream; the next one works."""
    server = own_server()
    for fault in (ValueError("broken"), RuntimeError("broken")):
        for stream in (False, True):
            server.engine.model.fault = fault
            found = server.post(CHAT, HELLO | {"max_tokens": 3, "stream": stream})
            server.engine.model.fault = None
            if stream and found.status_code == 200:
                events = [line[6:] for line in found.text.splitlines() if line.startswith("data: ")]
                error = json.loads(events[-1])["error"]
            else:
                assert found.status_code == 500
                error = found.json()["error"]
            assert error["type"] == "server_error" and "broken" in error["message"]
            assert server.post(CHAT, HELLO | {"max_tokens": 3}).status_code == 200
    server.wait(lambda: server.idle)
    assert server.engine.scheduler.cache.available == server.engine.pages


def test_prompts_are_not_logged(server: LiveServer, own_server: Callable[..., LiveServer], caplog: Any) -> None:
    caplog.set_level("INFO", "tulle.serve")
    body = {"messages": [{"role": "user", "content": "pineapple"}], "max_tokens": 1}
    assert server.post(CHAT, body).status_code == 200
    server.wait(lambda: "POST /v1/chat/completions 200" in caplog.text)
    assert "pineapple" not in caplog.text and "generated=1" in caplog.text
    other = own_server(log_prompts=True)
    other.post(CHAT, body)
    other.wait(lambda: "pineapple" in caplog.text)


def test_metrics(server: LiveServer) -> None:
    before = server.metric("tulle_generated_tokens_total"), server.metric("tulle_time_between_tokens_seconds_count")
    server.post(CHAT, HELLO | {"max_tokens": 5, "ignore_eos": True})
    text = server.http.get("/metrics").text
    for name in ("waiting", "running", "prompt_tokens", "cached", "weight_bytes_read", "pages_used", "first_token"):
        assert name in text
    assert server.metric("tulle_generated_tokens_total") == before[0] + 5
    assert server.metric("tulle_time_between_tokens_seconds_count") == before[1] + 4
    assert 'route="/v1/chat/completions",status="200"' in text
