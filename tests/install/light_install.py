"""What ``pip install tulle`` brings, without extras: found by the installed packages' own metadata, and linked.

The tests have no network. They link the base packages of this environment into a folder and run Tulle in an
interpreter that sees nothing else. ``make wheel`` installs a real wheel into a real environment instead
(``check_wheel.py``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import tulle
from tulle import _native

MAIN = "from tulle.cli.main import main; main()"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(of: str, extra: str = "") -> set[str]:
    """Names of what a distribution asks for itself, here, with an extra or without."""
    parsed = map(Requirement, metadata.requires(of) or ())
    return {canonical(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": extra})}


def closure(names: Iterable[str]) -> set[str]:
    """These distributions, what they ask for, what that asks for, and so on."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name not in found:
            found.add(name)
            waiting += requirements(name)
    return found


def files_of(name: str) -> list[tuple[Path, Path]]:
    """``(path in site-packages, file)`` of a distribution, without scripts and without byte code."""
    listed = metadata.distribution(name).files or ()
    kept = [f for f in listed if f.parts[0] != ".." and f.suffix != ".pyc" and "__pycache__" not in f.parts]
    return [(Path(*f.parts), Path(str(f.locate()))) for f in kept]


def own_files() -> list[Path]:
    """What Tulle's wheel holds: the sources that git knows, and the compiled module."""
    root = Path(tulle.__file__).parent
    listed = subprocess.run(["git", "ls-files", "-z", "."], cwd=root, capture_output=True, text=True, check=True)
    return [*(root / name for name in listed.stdout.split("\0") if name), Path(_native.__file__)]


def installed_bytes() -> dict[str, int]:
    """Bytes of each distribution of the light install, without byte code."""
    sizes = {
        name: sum(file.stat().st_size for _, file in files_of(name) if file.is_file())
        for name in closure(requirements("tulle"))
    }
    return sizes | {"tulle": sum(file.stat().st_size for file in own_files())}


def link(folder: Path) -> None:
    """Makes ``folder`` a site-packages of the light install, of links."""
    for name in closure(requirements("tulle")):
        for path, file in files_of(name):
            target = folder / path.parts[0]
            if not target.is_symlink():
                target.symlink_to(file.parents[len(path.parts) - 2] if len(path.parts) > 1 else file)
    (folder / "tulle").mkdir()
    for entry in [*Path(tulle.__file__).parent.iterdir(), Path(_native.__file__)]:
        if entry.name != "__pycache__":
            (folder / "tulle" / entry.name).symlink_to(entry)
    # Where an editable install keeps what it knows of the package.
    (about,) = {file.parent for path, file in files_of("tulle") if path.name == "METADATA"}
    (folder / about.name).symlink_to(about)


def run(
    site_packages: Path, arguments: Sequence[str], cwd: Path, text: str = "", code: str = MAIN
) -> subprocess.CompletedProcess[str]:
    """A command of Tulle in an interpreter that sees the standard library and ``site_packages`` alone."""
    command = [sys.executable, "-S", "-c", code, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(site_packages), input=text, capture_output=True, text=True, check=False
    )


def environment(site_packages: Path) -> Mapping[str, str]:
    # No user site, nothing of the caller's: PYTHONPATH is the whole of site-packages.
    return os.environ | {"PYTHONPATH": str(site_packages), "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def served(command: Sequence[str], model: str, cwd: Path, environment: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    """Starts ``tulle serve`` (``command`` is how to call ``tulle``), asks once, ends it: exit code and answer."""
    arguments = [*command, "serve", model, "--port", "0", "--served-name", "m"]
    server = subprocess.Popen(arguments, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        told = next((line for line in server.stderr if "http://" in line), "")
        address = re.search(r"http://[\w.:]+", told)
        assert address is not None, "the server ended before it said where it listens"
        body = json.dumps({"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}).encode()
        request = urllib.request.Request(
            f"{address[0]}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
        return server.returncode, answer
    finally:
        server.kill()


CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def chatting_model(folder: Path) -> Path:
    """The bundled model with a chat template, which it has none of."""
    bundled = Path(tulle.__file__).parent / "reference"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(bundled / name, folder / name)
    config = json.loads((bundled / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    return folder
