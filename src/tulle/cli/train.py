"""`tulle train`: train a model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tulle.cli import common


@common.checked("train")
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A training recipe: a YAML file, or the name of a shipped one.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the model, its curve and checkpoints.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
) -> None:
    """Train a model by a recipe: new, continued or fine-tuned; dense, sparse, or a pipeline of stages between the two.

    Several processes: accelerate launch --num_processes 2 $(which tulle) train RECIPE -o OUT

    Example: tulle train recipes/reference.yaml -o build/reference
    """
    from tulle.training.launch import train as run

    run(recipe, out, resume, log=lambda line: print(line, flush=True))
