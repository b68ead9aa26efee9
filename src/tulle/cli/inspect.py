"""``tulle inspect``: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tulle.cli import common
from tulle.errors import UserError


def inspect(
    model: common.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.html", help="Also write pictures as an HTML page.")
    ] = None,
    json_file: common.JsonFile = None,
) -> None:
    """Structure, bits, sparsity, sizes, outliers and sensitivity of MODEL, dense or compressed.

    Example: tulle inspect reference -o reference.html
    """
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UserError(f"expected -o to name an HTML file in a folder that exists, found {output}; try -o model.html")
    from tulle.inspection import inspect_model
    from tulle.models.hub import local_folder
    from tulle.report.inspection import describe, write_inspection
    from tulle.report.terminal import inspection_table

    with common.progress_bars() as progress:
        found = inspect_model(local_folder(model), progress)
    if output is not None:
        write_inspection(found, output)
    if str(json_file) != "-":
        out = common.console()
        out.print(f"{model}: {describe(found['architecture'])}, {found['totals']['bytes'] / 1e6:,.1f} MB")
        out.print(inspection_table(found))
    common.write_json(json_file, found)
