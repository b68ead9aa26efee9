"""One walk through the dense model before the real one, for recipe steps that concern the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tulle.core.contract import Progress, Survey
from tulle.core.rotation import Extremes
from tulle.models.anatomy import Anatomy
from tulle.models.rewrite import Source
from tulle.models.skeleton import Block
from tulle.observe import run_watched
from tulle.recipe import Recipe
from tulle.streams import Batch

TOKENS = 8192
"""Calibration tokens of the walk; its hidden states are in memory."""


@torch.no_grad()
def take_survey(
    config: PretrainedConfig,
    model: Anatomy,
    source: Source,
    recipe: Recipe,
    batches: Sequence[Batch],
    device: str = "cpu",
    progress: Progress | None = None,
    seed: int = 0,
) -> Survey:
    """Runs the recipe's model steps and returns what they decided. Equal inputs give equal decisions."""
    found: dict[tuple[int, str], Tensor] = {}
    survey = Survey(
        layers=model.layers,
        rows=lambda block, role: found[block, role],
        block=lambda index: {name: t.float().to(device) for name, t in source.read_block(index).items()},
        roles={row.role: row.linears for row in model.rows},
        norms={row.role: row.norm for row in model.rows if row.norm},
        prefix=model.block_prefix,
        hidden=model.hidden,
        seed=seed,
    )
    steps = recipe.stage("model")
    if any("rows" in step.method.needs for step in steps):
        _walk(config, model, source, batches, device, progress, seed, found)
    for step in steps:
        step.method.plan(survey, step.targets)
    return survey


def _walk(
    config: PretrainedConfig,
    model: Anatomy,
    source: Source,
    batches: Sequence[Batch],
    device: str,
    progress: Progress | None,
    seed: int,
    found: dict[tuple[int, str], Tensor],
) -> None:
    taken: list[Batch] = []
    for batch in batches:
        if taken and sum(int(b.valid.sum()) for b in taken) + int(batch.valid.sum()) > TOKENS:
            break
        taken.append(batch)
    embedding = source.embedding().float()
    hidden = [torch.nn.functional.embedding(b.tokens, embedding).to(device) for b in taken]
    for index in range(model.layers):
        if progress:
            progress(f"survey {index + 1}/{model.layers}", index, model.layers)
        block = Block(config, index, source.read_block(index), device)
        samplers: dict[str, Extremes] = {}
        for i, batch in enumerate(taken):
            hidden[i], inputs = run_watched(block, hidden[i], model.rows)
            for role, x in inputs.items():
                sampler = samplers.setdefault(role, Extremes(x.shape[-1], per_segment=4, random=128, seed=seed))
                sampler.add(x[batch.valid.to(device)])
        for role, sampler in samplers.items():
            found[index, role] = sampler.rows
