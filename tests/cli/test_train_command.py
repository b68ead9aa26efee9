"""``tulle train``: its help, and bad input in one line with exit code 2."""

from pathlib import Path

import pytest
import yaml

from tulle.cli.main import run

RECIPE = {
    "start": "reference",
    "data": {"sources": [{"path": "none.txt"}]},
    "training": {"tokens": 64, "context": 16, "batch": 4, "learning_rate": 0.01},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "expected a text file, JSONL file or folder, found nothing at none.txt"),
        ({"start": "nowhere/at/all"}, "expected a model folder"),
        ({"methods": [{"held": {}}]}, "expected a training method of held_masks"),
        ({"training": {**RECIPE["training"], "batch": "many"}}, "expected 'training.batch' to be valid"),
        ({"data": {"sources": [{"dataset": "owner/name"}]}}, "HF_HUB_OFFLINE is set"),
        ({"model": {}}, "expected 'model"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | change))
    code = run(["train", str(file), "-o", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("tulle: ") and message in error
    assert not list(Path(tmp_path).glob("out/*.safetensors"))


def test_help_has_an_example(capsys):
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "tulle train recipes/reference.yaml -o build/reference" in text and "accelerate launch" in text
