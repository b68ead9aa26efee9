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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod
from tulle.training import checkpoint
from tulle.training.architecture import OtherModel
from tulle.training.curve import read_metrics
from tulle.training.held_out import estimate
from tulle.training.optim import build_optimizers, learning_rate_factor, set_learning_rate
from tulle.training.processes import Processes
from tulle.training.recipe import Model, Training
from tulle.training.tokens import Corpus, Windows

Log = Callable[[str], None]


def build_model(shape: Model | OtherModel, vocab_size: int, context: int) -> PreTrainedModel:
    """A freshly initialised model of the recipe's shape, fp32, by transformers' own initialisation."""
    if isinstance(shape, OtherModel):
        return AutoModelForCausalLM.from_config(shape.make_config(vocab_size, context), dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=0,  # <|endoftext|> is the first entry of our vocabularies
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Loss:
    """Calls the model: cross-entropy in nats per token, and what the methods' own terms need of the outputs."""

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
) -> nn.Module:
    """Trains ``model`` in place and returns it wrapped; ``out`` gets ``metrics.jsonl`` and ``checkpoints``.

    ``record`` is written into checkpoints; ``resume`` is one to go on from; ``evaluate_first`` also measures the model
    as it comes. Raises ``UserError`` when the loss is no longer finite.
    """
    for method in methods:
        if processes.sharded and not method.sharded:
            raise UserError(
                f"expected methods that work on sharded weights under FSDP2, found {type(method).__name__}; "
                "launch with DDP or a single process"
            )
        method.prepare(model, settings.steps)
    wrapped, optimizers = processes.wrap(model, build_optimizers(model, settings))
    start = 0
    if resume is not None:
        start, _ = checkpoint.read_state(resume)
        checkpoint.load(resume, wrapped, optimizers, methods)
    if settings.compile and processes.count > 1:
        log("compile: true is for a single process; several run uncompiled")
        settings = settings.model_copy(update={"compile": False})
    loss_of = Loss(wrapped, settings, methods, processes.device, log)
    windows = Windows(corpus.train, settings.context, seed)
    per_step = settings.batch * settings.accumulation
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
    for step in range(start, settings.steps):
        factor = learning_rate_factor(step, settings)
        set_learning_rate(optimizers, settings.learning_rate * factor)
        rows = torch.from_numpy(windows.batch(step * per_step, per_step))
        losses.append(_step(step, wrapped, optimizers, loss_of, rows, settings, methods, processes))
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
                "learning_rate": settings.learning_rate * factor,
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
    return wrapped


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
    """One optimizer step on ``rows`` (batch * accumulation, context + 1); returns the mean cross-entropy in nats per
    token.
    """
    total = 0.0
    parts = rows.split(settings.batch)
    for number, part in enumerate(parts, 1):
        own = processes.share(part)
        last = number == len(parts)
        with contextlib.nullcontext() if last else processes.no_sync(model):
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
    """The rows of ``metrics.jsonl``; those past the step that a run goes on from are dropped, to be written again."""

    def __init__(self, path: Path, step: int, log: Log, main: bool):
        self._path, self._log, self._main = path, log, main
        if main and path.is_file():
            rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
            checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict[str, Any]) -> None:
        if not self._main:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._log("  ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in row.items()))
