"""One server for all tests that change nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from live_server import LiveServer, demo_folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_folder(tmp_path_factory.mktemp("serve") / "demo")


@pytest.fixture(scope="session")
def shared_server(demo: Path) -> Iterator[LiveServer]:
    server = LiveServer(demo, sequences=4)
    yield server
    server.close()


@pytest.fixture
def server(shared_server: LiveServer) -> Iterator[LiveServer]:
    """Afterwards nothing runs, no page is in use, and the model speaks by chance again."""
    yield shared_server
    engine = shared_server.engine
    engine.model.gate.set()
    shared_server.wait(lambda: shared_server.idle)
    engine.say("")
    engine.model.delay = 0.0
    assert engine.scheduler.cache.available == engine.pages


@pytest.fixture
def own_server(demo: Path) -> Iterator[Callable[..., LiveServer]]:
    """Makes servers with settings of their own."""
    made: list[LiveServer] = []

    def make(**settings: Any) -> LiveServer:
        made.append(LiveServer(demo, **settings))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.origin}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.origin, api_key="none", max_retries=0) as found:
        yield found
