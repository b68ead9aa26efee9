"""Optimizers and the learning-rate schedule of the training loop."""

from __future__ import annotations

import math

import torch
from torch import nn

from tulle.training.recipe import Training


def warmup_stable_decay(step: int, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """The factor on the peak learning rate at ``step`` (0 … steps-1): warmup-stable-decay, 1-sqrt form.

    Linear warm-up, a plateau, then ``1 - sqrt(t)`` over the last ``decay_fraction`` of the steps (Hägele et
    al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", section 3).
    Before the decay the factor does not depend on ``steps``: a run may be shortened or lengthened until
    then and is still the run that the new length would have given from the start.
    """
    decay_start = first_decay_step(steps, decay_fraction)
    if step >= decay_start:
        return 1 - math.sqrt((step - decay_start + 1) / (steps - decay_start + 1))
    return min(1.0, (step + 1) / (warmup_steps + 1))


def learning_rates(settings: Training) -> list[float]:
    """The learning rate of every step, by the recipe's schedule."""
    return [settings.learning_rate * _factor(step, settings) for step in range(settings.steps)]


def _factor(step: int, settings: Training) -> float:
    if settings.schedule == "wsd":
        return warmup_stable_decay(step, settings.steps, settings.warmup_steps, settings.decay_fraction)
    if step < settings.warmup_steps or settings.schedule == "constant":
        return min(1.0, (step + 1) / (settings.warmup_steps + 1))
    progress = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def length_matters_from(settings: Training) -> int:
    """The first step whose learning rate depends on the length of the run."""
    if settings.schedule == "constant":
        return settings.steps
    if settings.schedule == "wsd":
        return first_decay_step(settings.steps, settings.decay_fraction)
    return settings.warmup_steps


def first_decay_step(steps: int, decay_fraction: float) -> int:
    """The first step of the decay; ``steps`` if there is none."""
    return steps - round(decay_fraction * steps)


def build_optimizers(model: nn.Module, settings: Training) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices with AdamW for embeddings and norms.

    Weight decay acts on matrices only. Muon's update is scaled to AdamW's root mean square
    (``match_rms_adamw``, Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4), so that one
    learning rate serves both.
    """
    # A tied head is the same parameter as the embedding and is listed once.
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and not _is_embedding(name)]
    # Kernels of convolutions are no matrices to Muon, and decay like ones.
    tables = [p for name, p in named if p.ndim > 2 or (p.ndim == 2 and _is_embedding(name))]
    # The kept entries of a matrix in one vector (masks.HeldMasks, native) decay like the matrix.
    tables += [p for _, p in named if p.ndim < 2 and getattr(p, "decays", False)]
    vectors = [p for _, p in named if p.ndim < 2 and not getattr(p, "decays", False)]
    rate, decay = settings.learning_rate, settings.weight_decay
    by_adamw = [
        {"params": tables if settings.optimizer == "muon" else matrices + tables, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(by_adamw, lr=rate, betas=settings.betas, fused=True)]
    if settings.optimizer == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _is_embedding(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name
