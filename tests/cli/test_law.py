"""``tulle law`` from a file of runs to a page and an optimum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tulle.cli.main import run
from tulle.laws import Law

LAWS = {"full precision": Law(1.2, 2.0, 9.0, 0.22, 0.08), "1.58-bit": Law(1.3, 0.5, 12.0, 0.25, 0.05)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    rows = [
        f"{n:g},{s},{float(law.loss(n, s))!r},{kind}"
        for kind, law in LAWS.items()
        for n in (3e5, 1e6, 4e6)
        for s in (0.0, 0.2, 0.4, 0.6, 0.75)
    ]
    file = tmp_path / "runs.csv"
    file.write_text("\n".join(["size,sparsity,loss,weights", *rows]) + "\n")
    return file


def test_fit_and_optimum(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law, page, best = tmp_path / "law.json", tmp_path / "law.html", tmp_path / "best.json"
    command = ["law", "fit", str(runs), "--replicates", "5", "--hold-out", "13,28", "-o", str(page)]
    assert run([*command, "--json", str(law)]) == 0
    shown = capsys.readouterr().out
    assert "best sparsity" in shown and "1.58-bit" in shown and "held out: 4,000,000, 40 %" in shown
    found = json.loads(law.read_text())["laws"]
    for kind, true in LAWS.items():
        (held,) = found[kind]["held_out"]
        assert held["predicted"] == pytest.approx(held["loss"], rel=1e-3)
        assert found[kind]["optimum"] == pytest.approx(true.optimum, abs=0.01)
        assert len(found[kind]["runs"]) == 14
    html = page.read_text()
    assert html.count("<svg") == 6 and "Loss at equal active parameters, 1.58-bit" in html
    assert run(["law", "optimum", str(law), "--flops", "2e6", "--json", str(best)]) == 0
    optima = json.loads(best.read_text())
    assert optima["budget"] == 1e6
    for kind, true in LAWS.items():
        one = optima["optima"][kind]
        assert one["size"] * (1 - one["sparsity"]) == pytest.approx(1e6)
        assert one["loss"] == pytest.approx(true.loss_of_active(1e6, true.optimum), rel=1e-3)
        assert one["interval"][0] <= one["sparsity"] + 1e-3 and one["loss"] < one["dense_loss"]


def test_the_papers_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["law", "optimum", "published"]) == 0
    shown = capsys.readouterr().out
    assert "50.2 %" in shown and "the paper states 45.6 %" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "missing.csv"], "expected a file of runs"),
        (["fit", "RUNS", "--hold-out", "99"], "row numbers from 1 to 30"),
        (["fit", "RUNS", "--hold-out", "x"], "row numbers from 1 to 30"),
        (["fit", "RUNS", "-o", "nowhere/x.html"], "in a folder that exists"),
        (["optimum", "RUNS"], "expected the JSON that tulle law fit writes"),
        (["optimum", "published", "--active", "1", "--flops", "1"], "found both"),
        (["optimum", "published", "--active", "-1"], "budget above 0"),
    ],
)
def test_one_line_for_bad_input(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["law", *(str(runs) if a == "RUNS" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
