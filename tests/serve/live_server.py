"""A server on a port of its own, in a thread of the tests' process."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine

import tulle
from tulle.serve.app import create_app
from tulle.serve.registry import Registry
from tulle.serve.server import bind
from tulle.serve.settings import Settings

TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    """{% for c in m.tool_calls or [] %}{{ '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}"""
    """{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '\n' }}"""
    "{% endfor %}<|assistant|>"
)
"""Roles and content; tools as Hermes has them."""


def demo_folder(folder: Path, template: str = TEMPLATE) -> Path:
    """The packaged model, with a chat template."""
    folder.mkdir(parents=True)
    for file in (Path(tulle.__file__).parent / "reference").iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


class LiveServer:
    """Serves models made by ``FakeEngine``; ``settings`` as the command line's."""

    def __init__(self, folder: Path, **settings: Any):
        self.settings = Settings(models=[str(folder)], **settings)
        self.engines: list[FakeEngine] = []
        registry = Registry(self.settings, self._open)
        self.registry, self.app = registry, create_app(registry)
        self._socket = bind("127.0.0.1", 0)
        config = uvicorn.Config(self.app, log_config=None, ws="none", timeout_graceful_shutdown=1)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.port = self._socket.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.origin, timeout=30)
        self.wait(lambda: self._uvicorn.started)

    def _open(self, folder: Path, settings: Settings) -> FakeEngine:
        self.engines.append(FakeEngine(folder, settings.sequences, settings.context or 256))
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.registry.metrics.text().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))

    @staticmethod
    def wait(condition: Any, seconds: float = 10.0) -> None:
        """Until something holds; fails where it does not in time."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.005)

    @property
    def idle(self) -> bool:
        return all(entry.users == 0 for entry in self.registry.entries.values()) and self.engine.scheduler.idle

    def close(self) -> None:
        self.http.close()
        self.engine.model.gate.set()
        self._uvicorn.should_exit = True
        self._thread.join(10)
