"""What ``tulle inspect`` does with a Scaling Transformer: what its controllers choose on a text."""

from __future__ import annotations

from pathlib import Path

from tulle.cli import common


def fits(folder: Path) -> bool:
    """Whether the folder's config.json is a Scaling Transformer's. Raises ``UserError`` without a readable one."""
    from tulle.models.checkpoint import read_json
    from tulle.models.gguf.file import is_gguf

    if is_gguf(folder):
        return False
    return read_json(folder / "config.json", "a model's config.json").get("model_type") == "scaling_transformer"


def inspect(
    folder: Path,
    text: str | None,
    separator: str | None,
    samples: int,
    length: int,
    device: str,
    output: Path | None,
    json_file: Path | None,
) -> None:
    """Prints a table; writes the page and the JSON that are asked for."""
    from tulle.inspect.controllers import inspect_controllers
    from tulle.report.controller import describe, write_controllers
    from tulle.report.terminal import controller_table

    with common.progress_bars() as progress:
        found = inspect_controllers(
            folder, text, separator=separator, samples=samples, length=length, device=device, progress=progress
        )
    if output is not None:
        write_controllers(found, output)
    if str(json_file) != "-":
        out = common.console()
        out.print(f"{folder.name}: {describe(found['architecture'])}")
        out.print(controller_table(found))
    for layer in found["layers"]:
        del layer["shown"]  # for the page
    common.write_json(json_file, found)
