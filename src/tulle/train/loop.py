"""The training loop: a recipe in, a transformers checkpoint with its curve out.

Plain torch: bf16 autocast over fp32 weights, ``torch.compile``, fixed shapes, gradient clipping and
accumulation. With ``precision: fp32`` and ``compile: false`` a resumed run equals an undisturbed one bit
for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tulle.errors import UserError
from tulle.train import checkpoint
from tulle.train.curve import draw_curve, read_metrics
from tulle.train.held_out import bits_per_byte, estimate
from tulle.train.optim import build_optimizers, first_decay_step, set_learning_rate, warmup_stable_decay
from tulle.train.recipe import Model, TrainRecipe, load_recipe
from tulle.train.tokens import Corpus, Windows, prepare, save_tokenizer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def train(recipe_path: Path, out: Path, resume: bool = False, log: Callable[[str], None] = print) -> Path:
    """Train by a recipe; returns ``out``, a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    ``out`` also holds ``metrics.jsonl``, ``curve.png``, ``run.json`` and the newest training checkpoint.
    With ``resume`` a stopped run goes on from there, on the same curve; its number of tokens may change as
    long as the decay of the learning rate has not begun.

    Raises ``UserError`` for a bad recipe, a folder in use, or a recipe that differs from the run to be
    resumed.
    """
    recipe = load_recipe(recipe_path)
    found = _find_checkpoint(recipe, out, resume)
    if not resume and out.exists() and any(entry.name != "data" for entry in out.iterdir()):
        raise UserError(
            f"expected {out} to be empty, found files; try another folder, or --resume to go on with its run"
        )
    corpus = prepare(recipe.data, recipe.seed, recipe.training.context, out / "data")
    log(
        f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held-out tokens "
        f"of {corpus.held_out_bytes:,} bytes"
    )

    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, recipe.data.vocab_size, recipe.training.context)
    optimizers = build_optimizers(model, recipe.training)
    start = 0
    if found is not None:
        start, _ = checkpoint.read_state(found)
        checkpoint.load(found, model, optimizers)
    _run(recipe, model, optimizers, corpus, start, out, log)
    export(recipe, model, corpus, out)
    return out


def build_model(shape: Model, vocab_size: int, context: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the recipe's shape, fp32, by transformers' own initialisation."""
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


def _find_checkpoint(recipe: TrainRecipe, out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises ``UserError`` if ``recipe`` would leave the curve it
    is on.
    """
    found = checkpoint.latest(out / "checkpoints") if resume else None
    if found is None:
        return None
    step, content = checkpoint.read_state(found)
    old = TrainRecipe.model_validate(content)
    if _on_the_curve(old) != _on_the_curve(recipe):
        raise UserError(
            f"expected the recipe that {out} was started with, found another; try that one, or another output folder"
        )
    lengths = [old.training, recipe.training]
    decay = min(first_decay_step(t.steps, t.decay_fraction) for t in lengths)
    if lengths[0].steps != lengths[1].steps and step > decay:
        raise UserError(
            f"expected the number of tokens to stay {lengths[0].tokens} once the decay has begun, "
            f"found {lengths[1].tokens} at step {step}; try the old number"
        )
    return found


def _on_the_curve(recipe: TrainRecipe) -> dict:
    """What a resumed run must share: all but the length, checked apart, and what only changes the records."""
    return recipe.model_dump(
        exclude={"training": {"tokens", "evaluate_every", "evaluate_windows", "checkpoint_every", "compile"}}
    )


def compiled_loss(model: LlamaForCausalLM, recipe: TrainRecipe, log: Callable[[str], None]) -> Loss:
    """Mean cross-entropy (nats per token) of inputs and targets, both (batch, context) int64; compiled
    if possible.
    """
    settings = recipe.training

    def plain(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def precise(loss: Loss) -> Loss:
        def run(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            bf16 = settings.precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                return loss(inputs, targets)

        return run

    if not settings.compile:
        return precise(plain)
    compiled = precise(torch.compile(plain, dynamic=False))
    probe = torch.zeros(settings.batch, settings.context, dtype=torch.int64)
    try:
        compiled(probe, probe).backward()
    except Exception as error:  # of many kinds; the commonest cause is a machine without a C++ compiler
        reason = " ".join(str(error).split())[:200]
        log(f"torch.compile is not usable here, training goes on uncompiled and slower: {reason}")
        compiled = precise(plain)
    model.zero_grad(set_to_none=True)
    return compiled


def _run(
    recipe: TrainRecipe,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    corpus: Corpus,
    start: int,
    out: Path,
    log: Callable[[str], None],
) -> None:
    settings = recipe.training
    loss_of = compiled_loss(model, recipe, log)
    windows = Windows(corpus.train, settings.context, recipe.seed)
    per_step = settings.batch * settings.accumulation
    metrics = out / "metrics.jsonl"
    _truncate_metrics(metrics, start)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{parameters:,} parameters, steps {start} to {settings.steps} of {settings.step_tokens:,} tokens")
    model.train()
    began, tokens_since = time.perf_counter(), 0
    losses: list[float] = []
    for step in range(start, settings.steps):
        factor = warmup_stable_decay(step, settings.steps, settings.warmup_steps, settings.decay_fraction)
        set_learning_rate(optimizers, settings.learning_rate * factor)
        rows = torch.from_numpy(windows.batch(step * per_step, per_step))
        losses.append(_step(model, optimizers, loss_of, rows, recipe))
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"expected a finite training loss, found {losses[-1]} at step {step}; try a lower learning_rate"
            )
        tokens_since += settings.step_tokens
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.steps:
            seconds = time.perf_counter() - began
            bits = estimate(loss_of, corpus, settings.context, settings.batch, settings.evaluate_windows)
            row = {
                "step": done,
                "tokens": done * settings.step_tokens,
                "loss": float(np.mean(losses)),
                "held_out_bits_per_byte": bits,
                "learning_rate": settings.learning_rate * factor,
                "tokens_per_s": tokens_since / seconds,
            }
            with metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
            log("  ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in row.items()))
            losses, tokens_since, began = [], 0, time.perf_counter()
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            checkpoint.save(out / "checkpoints", done, recipe.model_dump(mode="json"), model, optimizers)


def _step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of: Loss,
    rows: torch.Tensor,
    recipe: TrainRecipe,
) -> float:
    """One optimizer step on ``rows`` (batch * accumulation, context + 1); returns the mean loss in nats
    per token.
    """
    settings = recipe.training
    total = 0.0
    for part in rows.split(settings.batch):
        loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous())
        (loss / settings.accumulation).backward()
        total += loss.item() / settings.accumulation
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop rows past the checkpoint: they will be written again."""
    if path.is_file():
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def export(recipe: TrainRecipe, model: LlamaForCausalLM, corpus: Corpus, out: Path) -> None:
    """Write the model (weights rounded to bf16), its tokenizer, its curve, and ``run.json``: recipe and
    figures.
    """
    model.bfloat16().save_pretrained(out)
    # Read back: a cast to bf16 has also rounded the rotary frequencies, which a loaded model computes anew.
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    save_tokenizer(corpus.tokenizer, out, recipe.training.context)
    rows = read_metrics(out / "metrics.jsonl")
    draw_curve(rows, out / "curve.png")
    record = {
        "held_out_bits_per_byte": bits_per_byte(saved, corpus, recipe.training.context),
        "held_out_bytes": corpus.held_out_bytes,
        "held_out_tokens": len(corpus.held_out) - 1,
        "tokens_seen": rows[-1]["tokens"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recipe": recipe.model_dump(mode="json"),
    }
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
