"""``tulle export``: a compressed model in a format that others read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from tulle.cli import common


@common.checked("export")
def export(
    model: common.Model,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="compressed-tensors, dense or gguf.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write, new or empty; of gguf the file.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of what is written as floating point: float32, float16 or bfloat16 [as stored]."),
    ] = None,
    json_file: common.JsonFile = None,
) -> None:
    """Write a compressed MODEL, or a GGUF file, in another format, load it back and compare the logits.

    Example: tulle export out --to compressed-tensors -o out-ct
    """
    from tulle.export import export as run
    from tulle.models.hub import local_folder

    with common.progress_bars() as progress:
        result = run(local_folder(model), to, output, dtype, progress)
    if str(json_file) != "-":
        common.console().print(_lines(result))
    common.write_json(json_file, result)


def _lines(result: dict[str, Any]) -> str:
    reader = "Tulle's own reader, value for value" if result["format"] == "gguf" else "plain transformers"
    lines = [f"{result['output']}: {result['format']}, {result['tensors']} tensors, {result['bytes'] / 1e6:.2f} MB"]
    if types := result.get("types"):
        kinds = Counter(types.values())
        lines.append("types: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    lines += [
        f"loaded back by {reader}: logits differ by {result['difference']:.1e} from what the format "
        f"should give, by {result['difference_from_packed']:.1e} from the packed model (shares of the largest logit)",
    ]
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])
