"""``tulle inspect --activations`` of a model whose inputs are sparse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import PROSE, write_checkpoint
from tulle.cli.main import run
from tulle.compression.job import compress
from tulle.text.reading import Text


def test_what_tokens_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    (tmp_path / "prose.txt").write_text(PROSE)
    recipe = {"steps": [{"wina": {"share": 0.75}}], "calibration": {"samples": 4, "length": 32}}
    compress(tmp_path / "m", recipe, tmp_path / "out", calibration=Text((PROSE,), False, ("prose",)))
    command = ["inspect", str(tmp_path / "out"), "--activations", "--text", str(tmp_path / "prose.txt")]
    assert run([*command, "-o", str(tmp_path / "x.html"), "--json", str(tmp_path / "x.json")]) == 0
    assert "parameters read per token" in capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["sparsity"] for row in found["activity"]["rows"]] == [0.75] * 4
    assert found["activity"]["total"]["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert "Activation sparsity" in (tmp_path / "x.html").read_text()
    assert run(["inspect", str(tmp_path / "out"), "--sensitivity"]) == 2
