"""``tulle demo``: the bundled model, dense and by recipes of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tulle.cli import common


@common.checked("demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")] = Path("demo"),
    json_file: common.JsonFile = None,
) -> None:
    """Compress the bundled model by a recipe of every kind and compare: size, quality and speed on this machine.

    Writes a table and report.html, in minutes. Nothing else should run meanwhile.

    Example: tulle demo -o demo
    """
    from tulle.compression.demo import run_demo
    from tulle.report.demo import cache_note, densified_note, disturbed_note
    from tulle.report.terminal import demo_table

    with common.progress_bars() as progress:
        found = run_demo(output, progress, progress.line)
    if str(json_file) != "-":
        out = common.console()
        out.print(demo_table(found, out.width))
        out.print(found["protocol"], style="dim")
        for note in filter(None, (cache_note(found), densified_note(found))):
            out.print(note, style="dim")
        if note := disturbed_note(found):
            out.print(note, style="yellow")
        out.print(f"{output / 'report.html'}")
    common.write_json(json_file, found)
