"""``tulle compress``: a checkpoint and a recipe in, a smaller checkpoint and a report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tulle import machine
from tulle.cli import common


@common.checked("compress")
def compress(
    model: common.Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A YAML file or a shipped recipe's name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write; new or empty.")],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE|DIR|DATASET",
            help="Text, JSONL, a folder or a data set; may be repeated [standard library].",
        ),
    ] = None,
    separator: common.Separator = None,
    min_chars: common.MinChars = 1,
    documents: common.Documents = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=1, help="Calibration sequences [the recipe's].")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="T", min=2, help="Tokens per sequence [the recipe's].")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Text for perplexity before and after; --separator and --min-chars apply to it too.",
        ),
    ] = None,
    eval_documents: Annotated[
        str | None, typer.Option("--eval-documents", metavar="A:B", help="Use documents A to B-1 of the --eval text.")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            "--costs",
            metavar="FOLDER",
            help="Keep what allocate_bits measures here: another size of the same model takes it from there.",
        ),
    ] = None,
    device: common.Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    json_file: common.JsonFile = None,
) -> None:
    """Compress MODEL by RECIPE into the folder OUT.

    Example: tulle compress reference -r sparse50-w4 -o out
    """
    chosen = common.parse_range(documents)
    chosen_eval = common.parse_range(eval_documents, "--eval-documents")
    from tulle.compression.job import Evaluation
    from tulle.evaluate.text import read_documents
    from tulle.models.hub import REFERENCE
    from tulle.report.terminal import compression_table
    from tulle.training.compress import compress as run

    machine.keep_freed_memory()
    compared = None
    if evaluation is not None:
        compared = Evaluation(read_documents(evaluation, separator, chosen_eval, min_chars))
    elif model == REFERENCE:
        from tulle.compression.demo import evaluation_text

        compared = Evaluation(*evaluation_text())
    try:
        with common.progress_bars() as progress:
            report = run(
                model, recipe, output,
                calibration=calibration, separator=separator, documents=chosen, min_chars=min_chars,
                samples=samples, length=length, evaluation=compared, device=device, seed=seed, resume=resume,
                progress=progress, costs=costs,
            )  # fmt: skip
    except KeyboardInterrupt as error:  # typer would leave out what the run says of its folder
        raise typer.Abort from error
    if str(json_file) != "-":
        out = common.console()
        out.print(compression_table(report))
        out.print(f"{output / 'report.html'}", style="dim")
    common.write_json(json_file, _summary(report, output))


def _summary(report: dict[str, Any], output: Path) -> dict[str, Any]:
    """The report without its per-linear part, which is in ``OUT/report.json``."""
    short = {k: v for k, v in report.items() if k not in ("linears", "blocks")}
    return json.loads(json.dumps(short)) | {"output": str(output)}
