"""Compressing with recovery in the recipe: steps, training, and steps on what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tulle.compression import job
from tulle.compression.calibration import calibration_text
from tulle.compression.job import Evaluation
from tulle.compression.recipe import Recipe, read_recipe
from tulle.compression.run_folder import has_content, in_use
from tulle.methods.contract import Progress
from tulle.models.checkpoint import Checkpoint, read_json, write_text
from tulle.models.rewrite import DenseModel
from tulle.text.reading import Text
from tulle.training.model_folder import unpack
from tulle.training.recover import recover


def compress(
    model: str | Path,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path,
    *,
    calibration: Text | Sequence[str | Path] | None = None,
    separator: str | None = None,
    documents: tuple[int, int] | None = None,
    min_chars: int = 1,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """:func:`tulle.compression.job.compress`, and recovery on the same text where the recipe has ``recover``.

    With ``then`` the steps before only prune or select inputs, what is trained are plain weights under their masks, and
    the steps of ``then`` compress the recovered model. Shares of dropped inputs stay as they were, unless ``then``
    decides them. Until all is done, models on the way lie beside ``output``.
    """
    chosen, text = read_recipe(recipe), calibration_text(calibration, separator, documents, min_chars)
    given: dict[str, Any] = {"device": device, "seed": seed, "progress": progress}
    if chosen.recover is None:
        return job.compress(
            model, chosen, output, calibration=text, evaluation=evaluation, resume=resume, **given, **settings
        )
    out = Path(output)
    pruned, recovered, dense = (out.with_name(f"{out.name}.{what}") for what in ("compressed", "recovered", "dense"))
    first = recovered if chosen.then else out
    if has_content(out) and not resume:
        raise in_use(out)
    if resume and (out / "report.json").exists() and not pruned.exists():
        found = read_json(out / "report.json", "a report")
        if found["recipe"] == chosen.to_json():
            return found
    try:
        if not has_content(first):
            alone = replace(chosen, recover=None, then=())
            job.compress(model, alone, pruned, calibration=text, resume=resume, **given, **settings)
        report = recover(
            pruned if pruned.exists() else first, model, first, chosen.recover, text=text, resume=resume,
            evaluation=None if chosen.then else evaluation, **given,
        )  # fmt: skip
        if chosen.then:
            if not dense.exists():
                unpack(recovered, dense, DenseModel.open(model).embedding_dtype)
            rest = replace(chosen, steps=chosen.then, recover=None, then=())
            shares = _input_shares(recovered)
            job.compress(
                dense, rest, out, calibration=text, resume=resume, input_shares=shares, **given, **settings
            )  # fmt: skip
            report = _told(out, report, chosen, str(model), evaluation, device, progress)
    except BaseException as error:
        error.add_note(f"what was done so far lies beside {out}: --resume goes on")
        raise
    for folder in (pruned, recovered, dense):
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _input_shares(folder: Path) -> dict[str, float]:
    """Shares of the inputs that every token drops, by linear of the packed model."""
    packed = Checkpoint.open(folder).packed
    assert packed is not None
    return {
        name: share
        for name, spec in packed.linears.items()
        if spec.input_sparsity is not None and (share := spec.input_sparsity.share(spec.shape[1])) is not None
    }


def _told(
    out: Path,
    recovered: dict[str, Any],
    recipe: Recipe,
    model: str,
    evaluation: Evaluation | None,
    device: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """The report of the whole recipe, in ``out``: the last steps' figures, what recovering gave, times of all."""
    report = read_json(out / "report.json", "a report")
    before, seconds = recovered["seconds"], report["seconds"]
    steps = before["steps"] | {k: v + before["steps"].get(k, 0.0) for k, v in seconds["steps"].items()}
    report["seconds"] = {k: v + before.get(k, 0.0) for k, v in seconds.items() if k != "steps"} | {"steps": steps}
    report |= {"model": model, "recover": recovered["recover"]}
    report["peak_memory_bytes"] = max(report["peak_memory_bytes"], recovered["peak_memory_bytes"])
    report["recipe"] = recipe.to_json()
    config = read_json(out / "config.json", "a config")
    config["quantization_config"]["recipe"] = recipe.to_json()
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    job.finish_report(report, out, DenseModel.open(model).checkpoint.path, evaluation, device, progress)
    return report
