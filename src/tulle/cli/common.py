"""What the commands share: one-line errors, progress bars, JSON files, ranges."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tulle.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, 'reference' (the bundled model), or a hub id.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - for standard output.")
]
Device = Annotated[str, typer.Option("--device", metavar="D", help="A torch device, such as cpu or cuda.")]
Separator = Annotated[
    str | None,
    typer.Option(
        "--separator", metavar="S", help="Cut the text into documents at this string; each is its own sequence."
    ),
]
Documents = Annotated[
    str | None,
    typer.Option("--documents", metavar="A:B", help="Use documents A to B-1, counted from 0 after --min-chars."),
]
MinChars = Annotated[
    int, typer.Option("--min-chars", metavar="N", min=1, help="Leave out documents with fewer characters.")
]


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """``progress(stage, done, total)`` drawn on standard error, or nothing where that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("load", total=None)
        yield lambda stage, done, total: bars.update(task, description=stage, completed=done, total=total)


def write_json(file: Path | None, result: Any) -> None:
    """Writes a result for machines, ``-`` to standard output; None writes nothing."""
    if file is None:
        return
    text = json.dumps(_finite(result), indent=2) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UserError(
            f"expected a file that can be written for --json, found {file} ({error.strerror}); try another path"
        ) from None


def parse_range(text: str | None, option: str = "--documents") -> tuple[int, int] | None:
    """``"200:456"`` → ``(200, 456)``; an open end counts as the last. Raises ``UserError``."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        found = (int(first or 0), int(last or sys.maxsize))
    except ValueError:
        found = (0, 0)
    if not colon or not 0 <= found[0] < found[1]:
        raise UserError(f"expected {option} as A:B with A < B, found {text!r}; try {option} 0:100")
    return found


def quiet_libraries() -> None:
    """Keeps transformers' own bars and advice off the terminal; call it before a command imports it or torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    # torch then asks for huge pages: a first touch of fresh memory costs a quarter.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
