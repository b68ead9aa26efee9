"""`tulle train`: train a small model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A training recipe (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the model, its curve and checkpoints.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
) -> None:
    """Train a model from scratch by a recipe.

    Example: tulle train recipes/reference.yaml -o build/reference
    """
    from tulle.train.loop import train as run

    run(recipe, out, resume, log=lambda line: print(line, flush=True))
