"""``tulle serve`` as a process, on the packaged model: signals, exit codes, and numbers beside the engine's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tulle.engine import Engine

READY = "Tulle serves "


class Process:
    """A server of its own; ``origin`` once it answers."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "tulle", "serve", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.log: list[str] = []
        self.origin = ""
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith(READY):
                self.origin = line.rsplit(" ", 1)[1].strip()
                break
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log += list(self.process.stderr)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@pytest.fixture(scope="module")
def served(demo: Path) -> Iterator[Process]:
    found = Process(str(demo), "--port", "0", "--sequences", "4", "--threads", "1", "--cache", "f32")
    yield found
    found.signal(signal.SIGKILL)
    found.wait()


@pytest.fixture(scope="module")
def engine(demo: Path) -> Engine:
    return Engine(demo, threads=1, cache="f32")


def test_numbers_are_the_engines(served: Process, engine: Engine) -> None:
    """Log-probabilities of prompt and continuation are the log-softmax of ``forward``'s logits; greedy text is
    ``generate``'s, streamed or not."""
    prompt = "def area(width, height):\n    return"
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "echo": True, "logprobs": 1}
    found = httpx.post(f"{served.origin}/v1/completions", json=body, timeout=60).json()["choices"][0]
    generated = engine.generate(prompt, 12)
    assert found["text"] == prompt + generated.text
    tokens = engine.text.encode(prompt) + generated.tokens
    logits = engine.forward(tokens).astype(np.float64)
    rows = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    expected = [rows[at - 1, token] for at, token in enumerate(tokens) if at]
    assert found["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=2e-3)
    pieces = []
    stream = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{served.origin}/v1/completions", json=stream, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert "".join(pieces) == generated.text and len(pieces) > 2


def test_facts(served: Process, engine: Engine) -> None:
    facts = httpx.get(f"{served.origin}/v1/tulle/info").json()
    assert facts["parameters"] == 5_770_496 and facts["bits_per_weight"] == 16 and facts["cache"] == "f32"
    assert (facts["context"], facts["threads"], facts["layout"]) == (engine.context, 1, engine.layout)


class SlowStream:
    """Many log-probabilities, of which a client takes little: they do not end before it has read them."""

    def __init__(self, process: Process):
        body = {"prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True, "n": 4, "logprobs": 20}
        content = json.dumps(body).encode()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(60)
        self._socket.connect(("127.0.0.1", int(process.origin.rsplit(":", 1)[1])))
        self._socket.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        self.bytes = self._socket.recv(1000)

    def read(self) -> list[str]:
        """All events."""
        with self._socket:
            while part := self._socket.recv(1 << 16):
                self.bytes += part
        return [line for line in self.bytes.decode().splitlines() if line.startswith("data: ")]


def test_drains(demo: Path) -> None:
    """The running stream ends by itself, new requests are refused, then the process ends with 0."""
    found = Process(str(demo), "--port", "0", "--threads", "1", "--sequences", "4")
    stream = SlowStream(found)
    found.signal(signal.SIGTERM)
    until = time.monotonic() + 30
    while (ready := httpx.get(f"{found.origin}/ready", timeout=30)).status_code == 200:
        assert time.monotonic() < until
    refused = httpx.post(f"{found.origin}/v1/completions", json={"prompt": "x"}, timeout=30)
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert httpx.get(f"{found.origin}/health", timeout=30).status_code == 200
    events = stream.read()
    assert events[-1] == "data: [DONE]" and len(events) > 4 * 300
    assert found.wait() == 0
    assert any("draining" in line for line in found.log)


@pytest.mark.parametrize("second", [True, False])
def test_stops_at_last(demo: Path, second: bool) -> None:
    """At a second signal, or when the time to drain is over, running streams get an error as their last event."""
    seconds = "60" if second else "0.2"
    found = Process(str(demo), "--port", "0", "--threads", "1", "--sequences", "4", "--drain-timeout", seconds)
    stream = SlowStream(found)
    found.signal(signal.SIGINT)
    if second:
        while httpx.get(f"{found.origin}/ready", timeout=30).status_code == 200:
            pass
        found.signal(signal.SIGINT)
    else:
        time.sleep(1)
    events = stream.read()
    assert json.loads(events[-1][6:])["error"]["code"] == "stopping"
    assert found.wait() == 0


def test_killed_in_the_midst(served: Process, demo: Path) -> None:
    """Clients see a closed connection; the model's files are as they were."""
    before = {file.name: file.stat().st_mtime_ns for file in demo.iterdir()}
    stream = SlowStream(served)
    served.signal(signal.SIGKILL)
    try:
        assert b"[DONE]" not in "".join(stream.read()).encode()
    except ConnectionResetError:
        pass
    served.wait()
    assert {file.name: file.stat().st_mtime_ns for file in demo.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "models"),
        (["no/such/model/here"], "expected a model folder"),
        (["reference", "--port", "70000"], "port"),
        (["reference", "--cache-memory", "much"], "expected a size such as 512MB"),
        (["reference", "--cache", "f64"], "expected a cache"),
        (["reference", "--host", "192.0.2.1"], "expected an address of this machine"),
        (["reference", "reference"], "different names"),
        (["reference", "--memory", "1MB"], "expected models of at most"),
        (["reference", "--served-name", "a", "--served-name", "b"], "served name"),
        (["reference", "--api-key", "two words"], "printable ASCII"),
        (["reference", "--config", "absent.yaml"], "expected settings in YAML"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2."""
    from tulle.cli.main import run

    assert run(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    from tulle.cli.main import run

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "reference", "--port", str(taken.getsockname()[1])]) == 2
    assert "expected a free port" in capsys.readouterr().err


def test_settings_from_a_file(tmp_path: Path) -> None:
    from tulle.errors import UserError
    from tulle.serve.settings import load

    file = tmp_path / "serve.yaml"
    file.write_text("models: [a, b]\nport: 9000\ncache-memory: 2GiB\napi_key: [x]\ndrain-timeout: 5\n")
    found = load(file, {"port": 9001, "host": None})
    assert (found.models, found.port, found.host) == (["a", "b"], 9001, "127.0.0.1")
    assert (found.cache_memory, found.api_key, found.drain_timeout) == (2 << 30, ["x"], 5)
    for wrong in ("no_such: 1", "- 1", "port: [", "models: []", "port: -1", "timeout: .nan", "max-body: 3XB"):
        file.write_text(wrong)
        with pytest.raises(UserError, match="expected"):
            load(file, {"models": ["a"]} if "models" not in wrong else {})
