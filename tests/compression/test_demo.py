"""The demo on a tiny model and one recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from tulle.compression import demo
from tulle.errors import UserError


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(demo, "REFERENCE", str(tmp_path / "model"))
    monkeypatch.setattr(demo, "RECIPES", ("w8a8",))
    monkeypatch.setattr(demo, "CALIBRATION_MODULES", 1)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 4)
    return tmp_path


def test_demo(tiny: Path) -> None:
    seen: list[int] = []
    found = demo.run_demo(tiny / "demo", lambda stage, done, total: seen.append(done), samples=2, characters=20)
    dense, compressed = found["rows"]
    assert (dense["name"], compressed["name"]) == ("dense", "w8a8")
    assert dense["tokens"] == compressed["tokens"] and compressed["bytes"] < dense["bytes"]
    # 8-bit weights and inputs cost little, but something.
    assert 0 < abs(compressed["bits_per_byte"] - dense["bits_per_byte"]) < 0.1
    assert json.loads((tiny / "demo" / "demo.json").read_text()) == found
    for page in ("report.html", "w8a8/report.html"):
        assert "</html>" in (tiny / "demo" / page).read_text(encoding="utf-8")
    evaluation = json.loads((tiny / "demo" / "w8a8" / "report.json").read_text())["evaluation"]
    assert evaluation["compressed"]["bits_per_byte"] == compressed["bits_per_byte"]
    assert seen == sorted(seen) and seen[-1] == 200  # percent of two models


def test_an_earlier_demo_is_replaced_and_nothing_else(tiny: Path) -> None:
    folder = tiny / "demo"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="found files in"):
        demo.run_demo(folder, lambda *_: None)
    assert (folder / "thesis.tex").exists()
    (folder / "thesis.tex").rename(tiny / "thesis.tex")
    (folder / "demo.json").write_text('{"finished": false}')
    (folder / "w8a8").mkdir()
    (folder / "w8a8" / "half").touch()
    demo._claim(folder)
    assert [f.name for f in folder.iterdir()] == ["demo.json"]
