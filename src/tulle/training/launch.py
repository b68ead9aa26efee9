"""The entry of ``tulle train``: reads the recipe, plans the run, claims its folder, and runs the stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tulle.errors import UserError
from tulle.models.checkpoint import read_json, write_text
from tulle.training import checkpoint
from tulle.training.optim import length_matters_from
from tulle.training.plan import make_plan
from tulle.training.processes import Processes
from tulle.training.recipe import TrainRecipe, load_recipe
from tulle.training.stages import run_stages

RECORDS = {"evaluate_every", "evaluate_windows", "checkpoint_every", "compile"}
"""Settings that change what is written down, not the curve."""


def train(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    resume: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Trains by a recipe (a YAML file, a shipped one's name, or its content) into the folder ``out``, and returns that.

    ``AutoModelForCausalLM.from_pretrained`` loads ``out``, or :func:`tulle.load` where the methods quantise or select
    inputs. It also holds ``metrics.jsonl``, ``curve.png``, ``run.json`` and the newest training checkpoint; with
    stages, each has a folder of its own under ``stages``. With ``resume`` a stopped run goes on from there, on the
    same curve; the number of tokens of a single stage may change as long as the learning rate does not depend on it
    yet.

    Raises ``UserError`` for a bad recipe, missing text or models, a folder in use, or a recipe that differs from the
    run to be resumed.
    """
    read, out = load_recipe(recipe), Path(out)
    plan = make_plan(read)
    processes = Processes()
    with processes.main_first():
        found = claim(read, out, resume, processes.main)
    run_stages(plan, out, found, processes, log if processes.main else _silent)
    return out


def _silent(line: str) -> None:
    """Only the main process speaks."""


def claim(recipe: TrainRecipe, out: Path, resume: bool, main: bool = True) -> Path | None:
    """Takes ``out`` for this run, and returns the checkpoint that a single stage continues from, if any.

    The ``main`` process writes. A pipeline that failed before its first checkpoint leaves nothing that counts: it may
    be started again with another recipe. Raises ``UserError`` unless ``out`` is new, or holds the run to go on with.
    """
    if not main:
        return _checkpoint(recipe, out) if resume else None
    record, stages = out / "recipe.json", out / "stages"
    begun = any(stages.glob("*/run.json")) or any(stages.glob("*/checkpoints/step-*"))
    ignored = {"data"} if begun else {"data", "recipe.json", "recipe.json.tmp", "stages", "start"}
    if not resume and out.exists() and any(entry.name not in ignored for entry in out.iterdir()):
        raise UserError(
            f"expected {out} to be empty, found files; try another folder, or --resume to go on with its run"
        )
    if not recipe.stages:
        return _checkpoint(recipe, out) if resume else None
    same = record.is_file() and _same_curve(read_json(record, "a recipe"), recipe)
    if begun and not same:
        raise _other_recipe(out)
    if not same:
        shutil.rmtree(stages, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(record, recipe.model_dump_json(indent=1) + "\n")
    return None


def _checkpoint(recipe: TrainRecipe, out: Path) -> Path | None:
    """The newest checkpoint of a single stage. Raises ``UserError`` if ``recipe`` would leave the curve it is on."""
    found = checkpoint.latest(out / "checkpoints")
    if found is None or recipe.stages:
        return None
    step, content = checkpoint.read_state(found)
    if not _same_curve(content, recipe):
        raise _other_recipe(out)
    lengths = [TrainRecipe.model_validate(content).training, recipe.training]
    # A method's schedule depends on the length from the first step on.
    decay = 0 if recipe.methods else min(length_matters_from(t) for t in lengths)
    if lengths[0].steps != lengths[1].steps and step > decay:
        raise UserError(
            f"expected the number of tokens to stay {lengths[0].tokens} once the decay has begun, "
            f"found {lengths[1].tokens} at step {step}; try the old number"
        )
    return found


def _other_recipe(out: Path) -> UserError:
    return UserError(
        f"expected the recipe that {out} was started with, found another; try that one, or another output folder"
    )


def _same_curve(content: dict[str, Any], recipe: TrainRecipe) -> bool:
    """Whether the recipe that a run has recorded gives the same curve as ``recipe``."""
    try:
        return _curve(TrainRecipe.model_validate(content)) == _curve(recipe)
    except ValidationError:  # written by another version
        return False


def _curve(recipe: TrainRecipe) -> dict[str, Any]:
    """What a resumed run must share: all but the length of a single stage, checked apart, and what only changes the
    records.
    """
    content = recipe.model_dump(exclude={"training": RECORDS | (set() if recipe.stages else {"tokens"})})
    for stage in content["stages"]:
        stage["training"] = {k: v for k, v in stage["training"].items() if k not in RECORDS}
    return content
