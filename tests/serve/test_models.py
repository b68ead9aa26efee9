"""Several models: by name, loaded on demand, within a bound of memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, demo_folder

from tulle.errors import UserError
from tulle.serve.registry import Registry
from tulle.serve.settings import Settings

MODEL = 11_540_992
"""Bytes of the packaged model's tensors."""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [demo_folder(tmp_path / name) for name in ("a", "b", "c")]


class Several(LiveServer):
    """A server of several models."""

    def __init__(self, folders: list[Path], **settings: Any):
        self._folders = folders
        super().__init__(folders[0], **settings)

    def ask(self, model: str) -> int:
        return self.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1}).status_code

    def loaded(self) -> list[str]:
        return [card["id"] for card in self.http.get("/v1/models").json()["data"] if card["loaded"]]


@pytest.fixture
def several(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Several]:
    settings = Settings

    def with_all(**given: Any) -> Settings:
        return settings(**given | {"models": [str(folder) for folder in folders]})

    monkeypatch.setattr("live_server.Settings", with_all)
    server = Several(folders, memory=2 * MODEL + 1000, served_name=["first"])
    yield server
    server.close()


def test_loaded_on_demand(several: Several) -> None:
    """Only the first at the start; what was unused for longest makes room, what answers does not."""
    assert several.loaded() == ["first"]
    assert several.ask("") == several.ask("first") == several.ask("b") == 200
    assert several.loaded() == ["first", "b"]
    assert several.ask("first") == several.ask("c") == 200
    assert several.loaded() == ["first", "c"]
    unloaded = weakref.ref(several.engines.pop(1))
    several.wait(lambda: unloaded() is None)
    for engine in several.engines:
        engine.model.gate.clear()
    several.wait(lambda: several.idle)
    body = {"prompt": "x", "max_tokens": 1, "stream": True}
    with several.http.stream("POST", "/v1/completions", json=body | {"model": "first"}):
        with several.http.stream("POST", "/v1/completions", json=body | {"model": "c"}):
            busy = several.post("/v1/completions", {"model": "b", "prompt": "x"})
            assert busy.status_code == 503 and busy.headers["retry-after"]
            for engine in several.engines:
                engine.model.gate.set()
    several.wait(lambda: all(entry.users == 0 for entry in several.registry.entries.values()))
    assert several.ask("b") == 200
    assert len(several.loaded()) == 2
    assert several.ask("d") == several.http.get("/v1/models/d").status_code == 404
    assert several.http.get("/v1/models/b").json()["id"] == "b"


def test_a_model_that_cannot_be_loaded(folders: list[Path]) -> None:
    """It is told so when it is asked for; the others go on."""
    (folders[1] / "config.json").unlink()
    with pytest.raises(UserError):
        Registry(Settings(models=[str(folder) for folder in folders]), lambda *_: None)  # type: ignore[arg-type]
