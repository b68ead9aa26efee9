"""``tulle recover``: a compressed model learns from the dense one what compressing it has cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tulle import machine
from tulle.cli import common


@common.checked("recover")
def recover(
    packed: Annotated[Path, typer.Argument(metavar="COMPRESSED", help="A folder that tulle compress has written.")],
    dense: Annotated[str, typer.Argument(metavar="MODEL", help="The model that it was made of.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write; new or empty.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE|DIR|DATASET", help="What to train on; may be repeated [standard library]."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Tokens to train on.")] = 2_000_000,
    train: Annotated[
        str, typer.Option("--train", metavar="codes|steps", help="Weights on their grids, or the grids' steps alone.")
    ] = "codes",
    context: Annotated[int, typer.Option("--context", metavar="T", min=2, help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option("--batch", metavar="B", min=1, help="Windows of an optimizer step.")] = 8,
    rate: Annotated[
        float,
        typer.Option("--rate", metavar="R", help="Learning rate at its peak, as a share of each tensor's size."),
    ] = 2e-3,
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="FILE", help="Text for perplexity of the dense and the new model.")
    ] = None,
    device: common.Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of the order of the windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    json_file: common.JsonFile = None,
) -> None:
    """Train COMPRESSED, a model made of MODEL, to do again what MODEL does; zeros and grids stay.

    Example: tulle recover out reference -o recovered --tokens 100000
    """
    from tulle.compression.calibration import calibration_text
    from tulle.compression.job import Evaluation
    from tulle.compression.recipe import read_recover
    from tulle.evaluate.text import read_documents
    from tulle.report.terminal import recovery_table
    from tulle.training.recover import recover as run

    machine.keep_freed_memory()
    settings = read_recover(
        {
            "tokens": tokens, "train": train, "context": context, "batch": batch, "rate": rate,
        }
    )  # fmt: skip
    compared = None if evaluation is None else Evaluation(read_documents(evaluation))
    try:
        with common.progress_bars() as progress:
            report = run(
                packed, dense, output, settings, text=calibration_text(text), evaluation=compared, device=device,
                seed=seed, resume=resume, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        raise typer.Abort from error
    if str(json_file) != "-":
        out = common.console()
        out.print(recovery_table(report))
        out.print(f"{output / 'report.html'}", style="dim")
    common.write_json(json_file, report["recover"] | {"evaluation": report["evaluation"], "output": str(output)})
