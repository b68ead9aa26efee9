"""Fuzz target: a damaged model must run or be refused with one line.

    make fuzz                  (pip install -e '.[fuzz]', then python fuzz/loader.py -max_total_time=60)

The engine's Python is instrumented; its native part aborts where it reads beyond an array if the extension was built
with TULLE_SANITIZE=ON. The bytes that the fuzzer makes are laid over a small packed model, so that it need not invent
one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests/engine")]

with atheris.instrument_imports(include=["tulle.engine", "tulle.format"]):
    from corruption import SCHEMES, try_model

from tiny_models import write_model  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="tulle-fuzz-"))


def prepare() -> dict[Path, bytes]:
    """A model in each layout and the engine's files, by path."""
    for layout, schemes in SCHEMES.items():
        write_model(FOLDER / layout, schemes, dtype="bfloat16")
        assert try_model(FOLDER / layout, layout) == "ran"
    files = [f for f in sorted(FOLDER.rglob("*")) if f.suffix in (".safetensors", ".json")]
    return {f: f.read_bytes() for f in files}


ORIGINAL = prepare()


def one(data: bytes) -> None:
    """Overwrites a few places of one file, or cuts it."""
    choice = atheris.FuzzedDataProvider(data)
    for path, content in ORIGINAL.items():
        if path.read_bytes() != content:
            path.write_bytes(content)
    path = sorted(ORIGINAL)[choice.ConsumeIntInRange(0, len(ORIGINAL) - 1)]
    changed = bytearray(ORIGINAL[path])
    for _ in range(choice.ConsumeIntInRange(1, 4)):
        at = choice.ConsumeIntInRange(0, len(changed) - 1)
        new = choice.ConsumeBytes(choice.ConsumeIntInRange(1, 12))
        changed[at : at + len(new)] = new
    if choice.ConsumeBool():
        del changed[choice.ConsumeIntInRange(1, len(changed)) :]
    path.write_bytes(changed)
    layout = path.relative_to(FOLDER).parts[0]
    try_model(FOLDER / layout, layout)


def main() -> None:
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
