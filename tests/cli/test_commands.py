"""The commands on a tiny model: what they write, and that their figures agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_checkpoint, write_prose
from html_page import Page
from tulle.cli import main

RECIPE = "name: tiny\nsteps:\n  - magnitude: {sparsity: 0.5}\n  - round_to_nearest: {bits: 4}\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a recipe, texts, and the model compressed with an evaluation."""
    folder = tmp_path_factory.mktemp("commands")
    write_checkpoint(folder / "model", seed=3)
    (folder / "recipe.yaml").write_text(RECIPE)
    write_prose(folder / "calibration.txt", 3000)
    (folder / "stories.txt").write_text("One small story.|Another story, somewhat longer.|no|The third of the stories.")
    arguments = [
        "-r",
        "recipe.yaml",
        "-o",
        "out",
        "--calibration",
        "calibration.txt",
        "--samples",
        "4",
        "--length",
        "64",
    ]
    arguments += ["--eval", "calibration.txt", "--eval-documents", "0:1", "--json", "summary.json"]
    assert run(folder, "compress", "model", *arguments) == 0
    return folder


def run(folder: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return main.run(arguments)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_compress_writes_model_report_and_page(work: Path) -> None:
    names = {f.name for f in (work / "out").iterdir()}
    assert {"config.json", "report.json", "report.html", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not (work / "out.partial").exists()
    report = read(work / "out" / "report.json")
    assert report["evaluation"]["protocol"].startswith("calibration.txt")
    assert report["evaluation"]["compressed"]["perplexity"] != report["evaluation"]["dense"]["perplexity"]
    assert "tiny" in (work / "out" / "report.html").read_text(encoding="utf-8")
    summary = read(work / "summary.json")
    assert summary["totals"] == report["totals"]
    assert "linears" not in summary


def test_eval_agrees_with_the_report(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = read(work / "out" / "report.json")["evaluation"]
    for model, which in (("model", "dense"), ("out", "compressed")):
        assert run(work, "eval", model, "--text", "calibration.txt", "--documents", "0:1", "--json", "eval.json") == 0
        found = read(work / "eval.json")
        assert found["perplexity"] == pytest.approx(expected[which]["perplexity"], rel=1e-6)
        assert found["protocol"] == expected["protocol"]
        assert set(found) == {"model", "perplexity", "bits_per_byte", "tokens", "bytes", "protocol"}
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "non-overlapping windows of 128 tokens" in out


def test_eval_selects_documents(work: Path) -> None:
    selection = ["--separator", "|", "--min-chars", "5", "--documents", "1:3", "--length", "16"]
    assert run(work, "eval", "model", "--text", "stories.txt", *selection, "--json", "eval.json") == 0
    found = read(work / "eval.json")
    assert found["tokens"] == 2 * 15  # two documents, cut at 16 tokens, no BOS
    assert "documents 1:3" in found["protocol"]


def test_eval_runs_tasks(work: Path) -> None:
    rows = [{"query": "The sky is", "choices": ["blue", "green"], "gold": i % 2} for i in range(4)]
    (work / "sky.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(work, "eval", "out", "--tasks", "sky.jsonl", "--limit", "2", "--json", "eval.json") == 0
    found = read(work / "eval.json")
    assert "perplexity" not in found
    (task,) = found["tasks"]
    assert (task["examples"], task["accuracy"]) == (2, 0.5)  # one answer to one question, once right


def test_json_alone_on_standard_output(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(work, "eval", "model", "--text", "stories.txt", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


@pytest.mark.parametrize(("model", "bits", "sparsity"), [("model", None, 0.0), ("out", 4, 0.5)])
def test_inspect(work: Path, model: str, bits: int | None, sparsity: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(work, "inspect", model, "-o", "page.html", "--json", "inspect.json") == 0
    found = read(work / "inspect.json")
    assert {x["bits"] for x in found["linears"]} == {bits}
    assert found["totals"]["sparsity"] == pytest.approx(sparsity, abs=0.08)  # 4-bit codes round some kept weights to 0
    page = Page((work / "page.html").read_text(encoding="utf-8"))
    assert page.title == model and "Every linear" in page.text
    linears = page.tables[0]
    assert [row[0] for row in linears[1:]] == [x["name"] for x in found["linears"]]
    assert "gate_up" in capsys.readouterr().out


def test_inspect_runs_the_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--activations", "--sensitivity", "--text", "calibration.txt", "--samples", "2", "--length", "40"]
    assert run(work, "inspect", "model", *arguments, "-o", "page.html", "--json", "inspect.json") == 0
    found = read(work / "inspect.json")
    assert len(found["activations"]["inputs"]) == 12 and found["activations"]["tokens"] == 80
    assert [m["bits"] for m in found["sensitivity"]] == [4, 8] and len(found["sensitivity"][0]["linears"]) == 21
    page = (work / "page.html").read_text(encoding="utf-8")
    for heading in ("Outliers of activations", "the most uneven input of", "The most sensitive linears, W8A8"):
        assert heading in page
    assert "R₁·P·R₂" in page and "loss rise" in capsys.readouterr().out
    stages = found["activations"]["landscapes"][0]["stages"]
    assert len(stages) == 6 and set(stages[0]) == {"name", "peak", "rounding_error", "output_error"}  # no pictures


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [
                "compress",
                "model",
                "-r",
                "recipe.yaml",
                "-o",
                "out",
                "--calibration",
                "calibration.txt",
                "--samples",
                "4",
            ],
            "expected an empty or new",
        ),
        (["compress", "model", "-r", "recipe.yaml", "-o", "new", "--eval", "nosuch.txt"], "nosuch.txt"),
        (["compress", "model", "-r", "nosuch", "-o", "new"], "nosuch"),
        (["compress", "model", "-r", "recipe.yaml", "-o", "new", "--device", "cuda:9"], "cuda:9"),
        (["eval", "model", "--text", "nosuch.txt"], "nosuch.txt"),
        (["eval", "model", "--text", "stories.txt", "--length", "4000"], "context (128 tokens)"),
        (["eval", "model", "--text", "stories.txt", "--dtype", "float31"], "float31"),
        (["eval", "model", "--text", "stories.txt", "--device", "cuda:9"], "cuda:9"),
        (["eval", "model", "--tasks", "nosuch.jsonl"], "nosuch.jsonl"),
        (["eval", "model", "--tasks", "arc_easy"], "arc_easy"),
        (["inspect", "model", "-o", "no/such/folder.html"], "folder that exists"),
        (["inspect", "model", "--text", "calibration.txt"], "--activations or --sensitivity with --text"),
        (["inspect", "model", "--samples", "2"], "--activations or --sensitivity with --samples"),
        (["inspect", "out", "--activations"], "expected a dense checkpoint"),
        (["inspect", "out", "--sensitivity"], "expected a dense checkpoint"),
        (["inspect", "model", "--activations", "--text", "stories.txt", "--length", "8", "--device", "x"], "a device"),
        (["inspect", "model", "--activations", "--text", "nosuch.txt"], "nosuch.txt"),
    ],
)
def test_bad_input(work: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(work, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (work / "new").exists()
