"""The demo on a tiny model and one recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_checkpoint
from html_page import Page
from tulle.compression import demo
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.evaluate import evaluate_text
from tulle.evaluate.loading import load_model


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
    lines: list[str] = []
    found = demo.run_demo(
        tiny / "demo", lambda stage, done, total: seen.append(done), lines.append, samples=2, characters=20, rounds=3
    )
    dense, compressed = found["rows"]
    assert [(row["name"], row["kind"]) for row in found["rows"]] == [("dense", "dense"), ("w8a8", "low-bit")]
    assert dense["tokens"] == compressed["tokens"] and compressed["bytes"] < dense["bytes"]
    # 8-bit weights and inputs cost little, but something.
    assert 0 < abs(compressed["bits_per_byte"] - dense["bits_per_byte"]) < 0.1
    assert json.loads((tiny / "demo" / "demo.json").read_text()) == found
    assert seen == sorted(seen) and seen[-1] == 300  # percent of two models and of the timing

    # Speed: the engine's, of both models.
    assert dense["speedup"] == 1
    assert compressed["speedup"] == compressed["decode_tokens_per_s"] / dense["decode_tokens_per_s"]
    for row in found["rows"]:
        low, high = row["decode_tokens_per_s_quartiles"]
        assert 0 < low <= row["decode_tokens_per_s"] <= high and row["prefill_tokens_per_s"] > 0
        assert row["read_bytes"] == row["weight_bytes"]  # a token reads all of them
    assert compressed["weight_bytes"] < dense["weight_bytes"]
    assert found["speed"]["rounds"] == 3 and found["speed"]["threads"] >= 1

    # A line per step, with its time and what came out.
    assert [line.split()[:2] for line in lines] == [
        ["evaluate", "dense"], ["compress", "w8a8"], ["evaluate", "w8a8"], ["time", "decoding"],
    ]  # fmt: skip
    assert all(re.search(r" \d[\d.]* s  ", line) for line in lines)
    assert f"{compressed['bits_per_byte']:.4f} bits per byte" in lines[2]

    page = Page((tiny / "demo" / "report.html").read_text(encoding="utf-8"))
    (table,) = page.tables
    assert [row[5] for row in table[1:]] == [f"{row['bits_per_byte']:.4f}" for row in found["rows"]]
    own = Page((tiny / "demo" / "w8a8" / "report.html").read_text(encoding="utf-8"))
    assert own.title.endswith("model → w8a8") and "Perplexity" in own.text
    evaluation = json.loads((tiny / "demo" / "w8a8" / "report.json").read_text())["evaluation"]
    assert evaluation["compressed"]["bits_per_byte"] == compressed["bits_per_byte"]


def test_the_engine_scores_as_torch_does(tiny: Path) -> None:
    """The demo's figures are the engine's, as it comes; those of ``tulle eval`` are torch's."""
    text, protocol = demo.evaluation_text(100)
    row = {"name": "dense"}
    demo._evaluate(row, tiny / "model", text, protocol, lambda line: None)
    model, tokenizer = load_model(tiny / "model")
    expected = evaluate_text(model, tokenizer, text, protocol)
    # The output head is in int8, but for the likeliest tokens.
    assert row["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=2e-3)
    assert (row["tokens"], row["scored_bytes"]) == (expected["tokens"], expected["bytes"])


def test_disturbed_timings_are_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny / "model", threads=1)
    for seconds, disturbed in ([1.0] * 4 + [1.05] * 4, False), ([1.0] * 4 + [1.5] * 4, True):
        monkeypatch.setattr(demo, "time_in_turn", lambda *_, s=seconds: [[(0.5, x) for x in s]])
        row: dict[str, Any] = {"name": "dense"}
        assert demo._time([row], [engine], 8, lambda done, of: None, lambda line: None)["disturbed"] is disturbed
        assert row["decode_tokens_per_s"] == pytest.approx(2 / (seconds[0] + seconds[-1]))


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
