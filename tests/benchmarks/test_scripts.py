"""Every benchmark imports, says what it does, and names only what tulle has."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from tulle.compression.recipe import read_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = sorted(file.stem for file in FOLDER.glob("*.py"))
SCRIPTS = [name for name in MODULES if '__name__ == "__main__"' in (FOLDER / f"{name}.py").read_text()]
IMPORT = re.compile(r"^\s*from (tulle[\w.]*) import (\([^)]*\)|[^\n(#]*)", re.MULTILINE)


def test_the_lists_are_whole() -> None:
    assert {"outliers", "synthetic", "cells"} <= set(MODULES) - set(SCRIPTS)
    assert {"agreement", "compress_large", "w4a4", "speed_worker", "gguf_model"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_benchmark_takes_from_tulle_is_there(name: str) -> None:
    """Also inside functions and in programs that a script passes to another Python: many import late."""
    importlib.import_module(name)
    for module, names in IMPORT.findall((FOLDER / f"{name}.py").read_text()):
        found = importlib.import_module(module)
        for wanted in filter(None, re.split(r"[\s,()]+", re.sub(r" as \w+|#.*", "", names))):
            if not hasattr(found, wanted):
                importlib.import_module(f"{module}.{wanted}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {name}.py") and script.__doc__.strip() in printed


def test_recipes_of_long_benchmarks_are_valid() -> None:
    """One that is not would be found after hours."""
    w4a4, recover = importlib.import_module("w4a4_real"), importlib.import_module("recover")
    cells = [{"name": "cell", "steps": steps} for steps in w4a4.recipes("auto-64", 2).values()]
    for cell in [*cells, *(recover.recipe(name, settings) for name in recover.CELLS for settings in (None, {}))]:
        read_recipe(cell)
