"""What a stage and a whole run leave: a model that loads, its figures, and the curve of its training."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulle.hf import load
from tulle.methods.train.method import TrainingMethod
from tulle.models.checkpoint import write_text
from tulle.training.corpus import Corpus
from tulle.training.curve import draw_curve, read_metrics
from tulle.training.held_out import bits_per_byte
from tulle.training.model_folder import load_dense, save_dense, sparsity
from tulle.training.pack import pack
from tulle.training.plan import Plan, PlannedStage
from tulle.training.tokenizer import copy_tokenizer

VERSIONS = {"python": platform.python_version(), "torch": torch.__version__}
CARRIED = ("stage", "held_out_bits_per_byte", "sparsity", "tokens_seen")
"""Figures of a stage that the run's record repeats."""


def save_stage(
    plan: Plan,
    stage: PlannedStage,
    folder: Path,
    weights: dict[str, Tensor],
    config: Any,
    corpus: Corpus,
    methods: Sequence[TrainingMethod],
    processes: int,
) -> None:
    """Writes the model of a trained stage with its tokenizer, its curve and ``run.json``.

    ``weights`` by name, ``config`` the model's, ``methods`` as they have finished, ``processes`` that trained. The
    folder of a single stage is what is shipped: bfloat16, and packed where the methods describe more than weights.
    In a pipeline the folder stays dense and float32, for the next stage to start from; the packed one is beside it.
    """
    context = stage.training.context
    save_dense(weights, config, folder, torch.bfloat16 if plan.single else torch.float32)
    packed = folder
    if stage.describes and not plan.single:
        packed = folder / "packed"
        save_dense(weights, config, packed, torch.bfloat16)
    # Read back: figures are those of the rounded weights.
    saved = load_dense(folder)
    zeros = sparsity(saved)
    for place in dict.fromkeys((folder, packed)):
        corpus.vocabulary.write_to(place, context)
    if stage.describes and pack(packed, methods):
        saved = load(packed, dtype=torch.float32)
    rows = read_metrics(folder / "metrics.jsonl") if stage.training.steps else []
    if rows:
        draw_curve(rows, folder / "curve.png")
    record = {
        "held_out_bits_per_byte": bits_per_byte(saved, corpus, context),
        "held_out_bytes": corpus.held_out_bytes,
        "held_out_tokens": len(corpus.held_out) - 1,
        "tokens_seen": rows[-1]["tokens"] if rows else 0,
        "sparsity": zeros,
        "processes": processes,
        **VERSIONS,
        "stage": stage.name,
        "recipe": plan.record,
    }
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def conclude(plan: Plan, folders: Sequence[Path], out: Path) -> None:
    """Writes the last stage's model into ``out`` in bfloat16, the curve of the whole run and a record of every stage.

    ``folders`` are the stages', in order.
    """
    last = folders[-1]
    if plan.stages[-1].describes:
        for file in (last / "packed").iterdir():
            shutil.copyfile(file, out / file.name)
    else:
        load_dense(last).bfloat16().save_pretrained(out)
    copy_tokenizer(last, out)
    rows: list[dict[str, Any]] = []
    boundaries, stages = [], []
    tokens = steps = 0
    for folder in folders:
        record = json.loads((folder / "run.json").read_text())
        own = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        for row in own:
            position = {"stage": record["stage"], "step": row["step"] + steps, "tokens": row["tokens"] + tokens}
            rows.append(row | position)
        if own:
            tokens, steps = tokens + own[-1]["tokens"], steps + own[-1]["step"]
        boundaries.append(tokens)
        stages.append({key: record[key] for key in CARRIED})
    write_text(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if any(math.isfinite(row.get("loss", math.nan)) for row in rows):
        draw_curve(rows, out / "curve.png", boundaries[:-1])
    record = {
        "stages": stages,
        "held_out_bits_per_byte": stages[-1]["held_out_bits_per_byte"],
        "sparsity": stages[-1]["sparsity"],
        "tokens_seen": tokens,
        **VERSIONS,
        "recipe": plan.record,
    }
    write_text(out / "run.json", json.dumps(record, indent=1) + "\n")
