"""A machine that only runs and serves models needs no torch: what ``pip install tulle`` alone can do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from light_install import (
    MAIN,
    chatting_model,
    closure,
    environment,
    installed_bytes,
    link,
    requirements,
    run,
    served,
)

from tulle.cli.common import NEEDS
from tulle.cli.main import app
from tulle.errors import UserError
from tulle.extras import EXTRAS, needs

LARGEST = 140e6
"""Bytes, without byte code. The base packages themselves are 122 MB, of which NumPy is 57; the bundled model is 12."""
LEFT_OUT = ("torch", "transformers", "scipy", "matplotlib", "accelerate")

BLOCKED = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LEFT_OUT}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""


def commands(command: object, path: str = "") -> Iterator[str]:
    """Every command of the command line, such as ``law fit``."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path
        return
    for name, one in below.items():
        yield from commands(one, f"{path} {name}".strip())


EVERY = list(commands(typer.main.get_command(app)))
ARGUMENTS = {
    "compress": ["reference", "-r", "sparse50-w4", "-o", "out"],
    "demo": ["-o", "out"],
    "export": ["reference", "--to", "dense", "-o", "out"],
    "inspect": ["reference"],
    "law fit": ["runs.csv"],
    "law optimum": ["published"],
    "recover": ["out", "reference", "-o", "recovered"],
    "train": ["recipe.yaml", "-o", "out"],
}
"""Enough for a command to begin."""
ON_THE_ENGINE = {"bench", "chat", "eval", "generate", "serve"}
"""What runs without an extra; ``serve`` is tested in tests/serve too."""


def test_every_command_runs_or_asks_for_its_extra() -> None:
    assert set(EVERY) - ON_THE_ENGINE == set(NEEDS) == set(ARGUMENTS)


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """``[exit code, standard error]`` of every command where torch, SciPy and the like cannot be imported."""
    lines = [[*name.split(), *ARGUMENTS[name]] for name in sorted(NEEDS)]
    lines += [[*name.split(), "--help"] for name in EVERY]
    lines += [["eval", "reference"], ["eval", "reference", "--backend", "engine", "--tasks", "arc_easy"]]
    code = BLOCKED + (
        "import contextlib, io, json\nfrom tulle.cli.main import run\nfound = {}\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = run(line)\n"
        "    found[' '.join(line)] = [code, err.getvalue()]\n"
        "print(json.dumps(found))"
    )
    folder = tmp_path_factory.mktemp("blocked")
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], cwd=folder, capture_output=True, text=True, check=True
    )
    assert list(folder.iterdir()) == []  # nothing was begun
    found: dict[str, list[object]] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_command_without_its_extra_says_which(blocked: dict[str, list[object]], name: str) -> None:
    code, error = blocked[" ".join([name, *ARGUMENTS[name]])]
    assert code == 2
    assert str(error).count("\n") == 1 and f"try: pip install 'tulle[{NEEDS[name]}]'" in str(error)
    assert f"for tulle {name}, found none" in str(error)


def test_help_needs_no_extra(blocked: dict[str, list[object]]) -> None:
    assert [blocked[f"{name} --help"] for name in EVERY] == [[0, ""]] * len(EVERY)


def test_eval_without_torch_names_both_ways_out(blocked: dict[str, list[object]]) -> None:
    code, error = blocked["eval reference"]
    assert code == 2 and "pip install 'tulle[compress]', or run the model with --backend engine" in str(error)
    code, error = blocked["eval reference --backend engine --tasks arc_easy"]
    assert code == 2 and "expected a JSONL file" in str(error)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "site-packages"
    folder.mkdir()
    link(folder)
    return folder


def test_the_light_install_holds_no_heavy_library(light: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print(*(n for n in {LEFT_OUT} if u.find_spec(n)))\nimport numpy, tulle"
    found = run(light, [], tmp_path, code=code)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr


def test_what_runs_on_it(light: Path, tmp_path: Path) -> None:
    model = str(chatting_model(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    (tmp_path / "task.jsonl").write_text('{"query": "import", "choices": ["os", "@@@"], "gold": 0}\n')
    asked = run(light, ["generate", model, "-p", "def f(", "-n", "8"], tmp_path)
    assert asked.returncode == 0 and asked.stdout.startswith("def f("), asked.stderr
    talk = run(light, ["chat", model, "-n", "8", "--temperature", "0"], tmp_path, "hello\nagain\n\n")
    assert talk.returncode == 0 and talk.stdout.count("\n") >= 2, talk.stderr
    timed = run(
        light, ["bench", model, "--prompt", "8", "--tokens", "4", "--rounds", "1", "--layout", "dense"], tmp_path
    )
    assert timed.returncode == 0, timed.stderr
    options = ["--backend", "engine", "--text", "text.txt", "--tasks", "task.jsonl", "--json", "-"]
    scored = run(light, ["eval", model, *options], tmp_path)
    assert scored.returncode == 0, scored.stderr
    found = json.loads(scored.stdout)
    assert 1 < found["perplexity"] < 1000 and found["tasks"][0]["accuracy"] in (0, 1)
    code, answer = served([sys.executable, "-S", "-c", MAIN], model, tmp_path, environment(light))
    assert (code, answer["choices"][0]["finish_reason"]) == (0, "length")
    refused = run(light, ["compress", model, "-r", "sparse50-w4", "-o", "out"], tmp_path)
    assert refused.returncode == 2 and "pip install 'tulle[compress]'" in refused.stderr


def test_the_light_install_is_small() -> None:
    sizes = installed_bytes()
    assert sum(sizes.values()) < LARGEST, sorted(sizes.items(), key=lambda one: -one[1])[:10]
    assert not {"torch", "transformers", "scipy", "matplotlib", "accelerate", "datasets"} & set(sizes)


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_brings_the_libraries_it_stands_for(extra: str) -> None:
    """Extras that hold others are written as ``tulle[other]``."""
    asked = {name: requirements("tulle", name) for name in ("compress", extra)}
    brought = asked[extra] | (asked["compress"] if "tulle" in asked[extra] else set())
    assert {name.replace("_", "-") for name in EXTRAS[extra]} <= brought
    assert not {name.replace("_", "-") for name in EXTRAS[extra]} & closure(requirements("tulle"))


def test_several_missing_libraries_make_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name != "torch" else object())
    with pytest.raises(UserError, match=r"^expected transformers and lm_eval for it, found none installed; try: "):
        needs("tasks", "it")
