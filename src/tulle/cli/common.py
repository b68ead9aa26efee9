"""What the commands share: one-line errors, progress bars, JSON files, ranges."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from tulle import extras
from tulle.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, a .gguf file, 'reference' (the bundled model), or a hub id."),
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

NEEDS = {
    "compress": "compress",
    "demo": "compress",
    "export": "compress",
    "inspect": "compress",
    "law fit": "compress",
    "law optimum": "compress",
    "recover": "compress",
    "train": "train",
}
"""The extra of pyproject.toml that a command cannot do without. ``eval`` asks by itself, as its backend wants."""

Parameters = ParamSpec("Parameters")


def checked(name: str) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """Decorates a command of ``NEEDS``: it asks for its extra before anything else. Its help needs none."""

    def decorate(function: Callable[Parameters, None]) -> Callable[Parameters, None]:
        @wraps(function)
        def command(*arguments: Parameters.args, **options: Parameters.kwargs) -> None:
            extras.needs(NEEDS[name], f"tulle {name}")
            function(*arguments, **options)

        return command

    return decorate


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


NOW_AND_THEN = 30.0
"""Seconds between two lines of progress where there is no terminal."""


class Progress:
    """What a command tells of its progress: ``progress(stage, done, total)`` often, ``progress.line(text)`` per step.

    This one is for where no bar can be drawn: it writes the stage once every ``NOW_AND_THEN`` seconds, and every line.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= NOW_AND_THEN:
            self.line(f"{100 * done // max(total, 1):3d} %  {stage}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._last = time.monotonic()
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)


class _Bar(Progress):
    """A bar at the bottom of the terminal, with the lines above it."""

    def __init__(self, bars: Bars):
        super().__init__()
        self._bars = bars
        self._task = bars.add_task("load", total=None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._bars.update(self._task, description=stage, completed=done, total=total)

    def line(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Progress]:
    """Progress on standard error: a bar on a terminal, else a line now and then; nothing at all if ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield Progress(quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<38}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars)


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
