"""The whole road of a training recipe: training (:mod:`tulle.train`) with pruning at its marks and packing at its ends,
which is what the compression recipes do, and with models that are packed or on the hub as its starting points.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tulle.compression.job import compress
from tulle.compression.recipe import METHODS, Recipe, load_recipe, parse_recipe
from tulle.errors import UserError
from tulle.export import dense
from tulle.export.folder import whole_folder, write_entries
from tulle.hf import load, packed_linears, require_packed_tensors
from tulle.models.checkpoint import Checkpoint, companions, write_text
from tulle.models.hub import local_folder
from tulle.text.reading import Text
from tulle.training import recipe as training
from tulle.training.pack import pack
from tulle.training.stages import Tools, run


def train(recipe: str | Path, out: str | Path, resume: bool = False, log: Any = print) -> Path:
    """Trains by the recipe in a YAML file into the folder ``out``, which transformers loads (see ``train.stages``).

    Raises ``UserError`` for a bad recipe, missing text or models, or a folder in use.
    """
    return run(training.load_recipe(Path(recipe)), Path(out), TOOLS, resume, log)


def dense_folder(model: str, work: Path) -> Path:
    """The folder of a model, unpacked into ``work`` if it is a packed one."""
    folder = local_folder(model)
    if "quantization_config" not in Checkpoint.open(folder).config:
        return folder
    if not work.exists():
        unpack(folder, work)
    return work


def unpack(packed: Path, target: Path) -> None:
    """Writes a packed folder as a dense float32 checkpoint; what was pruned is exactly zero."""
    checkpoint = Checkpoint.open(packed)
    linears = packed_linears(checkpoint)
    require_packed_tensors(checkpoint, linears)
    plan = dense.plan(checkpoint, linears, torch.float32)
    with whole_folder(target) as folder:
        write_entries(folder, plan.entries, lambda done, total: None)
        for file in companions(packed):
            shutil.copyfile(file, folder / file.name)
        write_text(folder / "config.json", json.dumps(plan.config, indent=2) + "\n")


def check(recipe: Any, dense: bool) -> bool:
    """Raises ``UserError`` unless ``recipe`` is a compression recipe, and leaves dense weights where it must: by steps
    that prune or rotate. Whether it changes the basis of the residual stream."""
    steps = _recipe(recipe).steps
    for step in steps:
        if dense and not METHODS[step.name].startswith(("tulle.methods.prune.", "tulle.methods.activation.larosa")):
            raise UserError(
                f"expected pruning steps or larosa in prune, found {step.name}; quantise with compress: after the "
                "training"
            )
    return any(step.method.changes_residual_basis(step.targets) for step in steps)


def prune(source: Path, recipe: Any, texts: Sequence[str], target: Path, seed: int) -> None:
    """Prunes a dense folder into a dense float32 one, calibrated on ``texts``; the report of the pruning lies beside
    the weights.
    """
    packed = target.with_name(target.name + "-packed")
    _compress(source, recipe, texts, packed, seed)
    unpack(packed, target)
    for report in packed.glob("report.*"):
        shutil.copyfile(report, target / report.name)
    shutil.rmtree(packed)


def _compress(source: Path, recipe: Any, texts: Sequence[str], target: Path, seed: int) -> None:
    text = Text(tuple(texts), False, ("training text of the stage",))
    compress(source, _recipe(recipe), target, calibration=text, seed=seed, resume=True)


def _recipe(recipe: Any) -> Recipe:
    return parse_recipe(recipe) if isinstance(recipe, dict) else load_recipe(recipe)


def _load(folder: Path) -> PreTrainedModel:
    return load(folder, dtype=torch.float32)


TOOLS = Tools(folder=dense_folder, check=check, prune=prune, compress=_compress, pack=pack, load=_load)
