"""The training loop of one stage.

bf16 autocast over fp32 weights, ``torch.compile``, fixed shapes, gradient accumulation and clipping; one process, DDP
or FSDP2 (``processes``). With ``precision: fp32`` and ``compile: false`` a resumed run equals an undisturbed one bit
for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod
from tulle.models.checkpoint import write_text
from tulle.training import checkpoint
from tulle.training.corpus import Corpus
from tulle.training.curve import read_metrics
from tulle.training.held_out import estimate
from tulle.training.optim import build_optimizers, learning_rates
from tulle.training.processes import Processes
from tulle.training.recipe import Training

Log = Callable[[str], None]


class Loss:
    """Calls the model: cross-entropy in nats per token, and what the methods' own terms need of the outputs.

    Inputs and targets are ids ``[B, context]``, the targets one token further.
    """

    def __init__(
        self, model: nn.Module, settings: Training, methods: Sequence[TrainingMethod], device: torch.device, log: Log
    ):
        self._model, self._settings, self._methods, self._device = model, settings, methods, device
        self._hidden = any(method.hidden_states for method in methods)
        self._terms = any(type(method).loss_terms is not TrainingMethod.loss_terms for method in methods)
        self._call = self._compiled(log) if settings.compile else self._plain

    def _plain(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        outputs = self._model(input_ids=inputs, use_cache=False, output_hidden_states=self._hidden)
        loss = functional.cross_entropy(outputs.logits.float().flatten(0, 1), targets.flatten())
        return loss, outputs.logits if self._terms else None, outputs.hidden_states if self._hidden else None

    def _precise(self) -> contextlib.AbstractContextManager[object]:
        if self._settings.precision == "bf16":
            return torch.autocast(self._device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _compiled(self, log: Log) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, Any]]:
        compiled = torch.compile(self._plain, dynamic=False)
        probe = torch.zeros(self._settings.batch, self._settings.context, dtype=torch.int64, device=self._device)
        try:
            with self._precise():
                found = compiled(probe, probe)
            found[0].backward()
        except Exception as error:  # of many kinds; the commonest cause is a machine without a C++ compiler
            reason = " ".join(str(error).split())[:200]
            log(f"torch.compile is not usable here, training goes on uncompiled and slower: {reason}")
            compiled = self._plain
        self._model.zero_grad(set_to_none=True)
        return compiled

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy alone."""
        with self._precise():
            return self._call(inputs, targets)[0]

    def with_terms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimised, cross-entropy)."""
        with self._precise():
            loss, logits, hidden = self._call(inputs, targets)
        outputs = SimpleNamespace(loss=loss, logits=logits, hidden_states=hidden)
        total = loss
        for method in self._methods:
            for term in method.loss_terms({"input_ids": inputs}, outputs).values():
                total = total + term
        return total, loss


def fit(
    model: nn.Module,
    corpus: Corpus,
    settings: Training,
    methods: Sequence[TrainingMethod],
    out: Path,
    *,
    seed: int,
    record: dict[str, Any],
    processes: Processes,
    log: Log,
    resume: Path | None = None,
    evaluate_first: bool = False,
) -> dict[str, Tensor]:
    """Trains ``model`` in place and returns its weights by name, whole and on the CPU.

    ``out`` gets ``metrics.jsonl`` and ``checkpoints``. ``record`` is written into checkpoints; ``resume`` is one to
    continue from; ``evaluate_first`` also measures the model as it comes. Raises ``UserError`` when the loss is no
    longer finite, for too little text, and for methods and optimizers that the processes cannot run.
    """
    for method in methods:
        if processes.sharded and not method.sharded:
            raise UserError(
                f"expected methods that work on sharded weights under FSDP2, found {type(method).__name__}; "
                "launch with DDP or a single process"
            )
        method.prepare(model, settings.steps)
    wrapped, optimizers = processes.wrap(model, build_optimizers(model, settings))
    rates = learning_rates(settings)
    start = 0 if resume is None else checkpoint.load(resume, wrapped, optimizers, methods)
    windows = corpus.windows(settings.context, seed)
    batches = windows.batches(start, settings.steps, settings.batch * settings.accumulation)
    if settings.compile and processes.count > 1:
        log("compile: true is for a single process; several run uncompiled")
        settings = settings.model_copy(update={"compile": False})
    loss_of = Loss(wrapped, settings, methods, processes.device, log)
    metrics = Metrics(out / "metrics.jsonl", start, log, processes.main)
    count = sum(p.numel() for p in model.parameters())
    log(f"{count:,} parameters, steps {start} to {settings.steps} of {settings.step_tokens:,} tokens")

    def evaluated() -> float:
        wrapped.eval()  # some models draw noise in training
        bits = estimate(loss_of, corpus, settings.context, settings.batch, settings.evaluate_windows, processes.device)
        wrapped.train()
        return bits

    wrapped.train()
    if evaluate_first and start == 0:
        metrics.write({"step": 0, "tokens": 0, "held_out_bits_per_byte": evaluated()})
    began, tokens_since = time.perf_counter(), 0
    losses: list[float] = []
    for step, rows in enumerate(batches, start):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rates[step]
        losses.append(_step(step, wrapped, optimizers, loss_of, torch.from_numpy(rows), settings, methods, processes))
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"expected a finite training loss, found {losses[-1]} at step {step}; try a lower learning_rate"
            )
        tokens_since += settings.step_tokens
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.steps:
            seconds = time.perf_counter() - began
            row = {
                "step": done,
                "tokens": done * settings.step_tokens,
                "loss": float(np.mean(losses)),
                "held_out_bits_per_byte": evaluated(),
                "learning_rate": rates[step],
                "tokens_per_s": tokens_since / seconds,
            }
            for method in methods:
                row |= method.metrics()
            metrics.write(row)
            losses, tokens_since, began = [], 0, time.perf_counter()
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            checkpoint.save(out / "checkpoints", done, record, wrapped, optimizers, methods, processes.main)
    for method in methods:
        method.finish()
    return checkpoint.weights(wrapped)


def _step(
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Loss,
    rows: Tensor,
    settings: Training,
    methods: Sequence[TrainingMethod],
    processes: Processes,
) -> float:
    """One optimizer step on ``rows`` ``[batch * accumulation, context + 1]``; returns the mean cross-entropy in nats
    per token.
    """
    total = 0.0
    for own in processes.micro_batches(model, rows, settings.batch):
        loss, entropy = loss_of.with_terms(own[:, :-1].contiguous(), own[:, 1:].contiguous())
        (loss / settings.accumulation).backward()
        total += entropy.item() / settings.accumulation
    for method in methods:
        method.after_backward(step)
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()
    for method in methods:
        method.after_step(step, optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return processes.mean(total)


class Metrics:
    """The rows of ``metrics.jsonl``; those past the step that a run continues from are dropped, to be written again."""

    def __init__(self, path: Path, step: int, log: Log, main: bool):
        self._path, self._log, self._main = path, log, main
        if main and path.is_file():
            rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict[str, Any]) -> None:
        if not self._main:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._log("  ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in row.items()))
