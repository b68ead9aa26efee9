"""A recipe in, a transformers checkpoint with its curve out: the stages of a training run, one after the other.

What lies above training (pruning at a mark, packing, models that are packed or on the hub) comes in as ``Tools``;
``tulle.training.launch`` has them.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod
from tulle.methods.train.squarehead import SquareHead
from tulle.training import checkpoint
from tulle.training.curve import draw_curve, read_metrics
from tulle.training.held_out import bits_per_byte
from tulle.training.loop import Log, build_model, fit
from tulle.training.optim import length_matters_from
from tulle.training.processes import Processes
from tulle.training.recipe import ResolvedStage, TrainRecipe, make_methods
from tulle.training.tokens import Corpus, Vocabulary, prepare, save_tokenizer, training_documents

CALIBRATION_DOCUMENTS = 1024
"""Training documents that a pruning step may draw its calibration text from."""
RECORDS = {"evaluate_every", "evaluate_windows", "checkpoint_every", "compile"}
"""Settings that change what is written down, not the curve."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class Tools:
    """What a road needs from above."""

    folder: Callable[[str, Path], Path]
    """(model, work) → the folder of a dense checkpoint; what must be unpacked for that goes into ``work``."""
    check: Callable[[Any, bool], bool]
    """(compression recipe, whether it must leave dense weights): raises ``UserError`` unless it is valid; whether it
    gives the residual stream another basis."""
    prune: Callable[[Path, Any, Sequence[str], Path, int], None]
    """(dense folder, recipe, calibration texts, new folder, seed): prunes or rotates into a dense float32 folder."""
    compress: Callable[[Path, Any, Sequence[str], Path, int], None]
    """The same into a packed folder."""
    pack: Callable[[Path, Sequence[TrainingMethod]], bool]
    """(dense folder, methods): packs it in place as the methods describe it; False where nothing needs that."""
    load: Callable[[Path], PreTrainedModel]
    """The model of a packed folder, float32."""


def run(recipe: TrainRecipe, out: Path, tools: Tools, resume: bool = False, log: Log = print) -> Path:
    """Train by a recipe; returns ``out``, a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    ``out`` also holds ``metrics.jsonl``, ``curve.png``, ``run.json`` and the newest training checkpoint; with stages,
    each has a folder of its own under ``stages``. With ``resume`` a stopped run goes on from there, on the same curve;
    the number of tokens of a single stage may change as long as the learning rate does not depend on it yet.

    Raises ``UserError`` for a bad recipe, a folder in use, or a recipe that differs from the run to be resumed.
    """
    processes = Processes()
    log = log if processes.main else _silent
    check_bases(recipe, tools)
    for stage in recipe.resolved():
        if stage.compress is not None:
            tools.check(stage.compress, False)
            if any(describes(method) for method in make_methods(stage.methods)):
                raise UserError(
                    f"expected no compress in stage {stage.name}, whose methods quantise or select inputs themselves, "
                    "found one; leave it out"
                )
    with processes.main_first():
        if processes.main:
            _claim(recipe, out, resume)
    road = _Road(recipe, out, tools, processes, log)
    if not recipe.stages:
        (stage,) = recipe.resolved()
        road.stage(stage, out, torch.bfloat16, _find_checkpoint(recipe, out, resume))
        return out
    done: list[Path] = []
    for number, stage in enumerate(recipe.resolved(), 1):
        folder = out / "stages" / f"{number:02d}-{stage.name}"
        log(f"stage {number} of {len(recipe.stages)}: {stage.name}")
        if not (folder / "run.json").is_file():
            road.stage(stage, folder, torch.float32, checkpoint.latest(folder / "checkpoints"))
        road.compress(stage, folder)
        road.passed(stage.name, folder)
        done.append(folder)
    if processes.main:
        _conclude(recipe, done, out)
    processes.wait()
    return out


def check_bases(recipe: TrainRecipe, tools: Tools) -> None:
    """Checks what the stages do before training; hidden states are compared only in one basis.

    Raises ``UserError`` for a bad ``prune``, and for a stage whose teacher has its residual stream in another basis.
    """
    # By stage, the stage that turned the residual stream last; nothing for what comes from elsewhere.
    turned: dict[str, str] = {}
    before = ""
    for stage in recipe.resolved():
        turned[stage.name] = turned.get(stage.start or before, "")
        if stage.prune is not None and tools.check(stage.prune, True):
            turned[stage.name] = stage.name
        before = stage.name
        for method in make_methods(stage.methods):
            teacher = getattr(method, "teacher", None)
            if teacher is not None and turned.get(teacher, "") != turned[stage.name]:
                raise UserError(
                    f"expected a teacher for stage {stage.name} with its residual stream in the student's basis, found "
                    f"{teacher!r}, where it was not turned as in stage {turned[stage.name] or teacher}; turn it in a "
                    "stage of its own (tokens: 0) and name that as the teacher"
                )


def _silent(line: str) -> None:
    """Only the main process speaks."""


class _Road:
    """Runs stages, each from where the one before it ended."""

    def __init__(self, recipe: TrainRecipe, out: Path, tools: Tools, processes: Processes, log: Log):
        self._recipe, self._out, self._tools, self._processes, self._log = recipe, out, tools, processes, log
        self._start: Path | None = None
        if recipe.start is not None:
            with processes.main_first():
                self._start = tools.folder(recipe.start, out / "start")
        self._last = self._start
        self._folders: dict[str, Path] = {} if self._start is None else {"start": self._start}
        self._tokenizer = self._start
        """A folder whose tokenizer everything is read with; None: the one that is trained for a new model."""

    def passed(self, name: str, folder: Path) -> None:
        """The next stage starts from this folder."""
        self._last = self._folders[name] = folder
        self._tokenizer = self._tokenizer or folder

    def stage(self, stage: ResolvedStage, folder: Path, dtype: torch.dtype, found: Path | None) -> None:
        recipe, processes = self._recipe, self._processes
        folder.mkdir(parents=True, exist_ok=True)
        settings, data = stage.training, self._out / "data"
        vocabulary = None if self._tokenizer is None else read_vocabulary(self._tokenizer)
        with processes.main_first():
            corpus = prepare(stage.data, recipe.seed, settings.context, data, vocabulary)
        self._log(
            f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held-out tokens "
            f"of {corpus.held_out_bytes:,} bytes"
        )
        texts = self._calibration(stage) if processes.main and stage.prune is not None else []
        methods = make_methods(stage.methods)
        for method in methods:
            if isinstance(method, SquareHead):
                method.teach(self._teacher(method.teacher))
        source = self._last if stage.start is None else self._named(stage.start)
        torch.manual_seed(recipe.seed)
        model, config = self._model(stage, source, folder, corpus, texts)
        count = processes.count
        if settings.steps:
            wrapped = fit(
                model, corpus, settings, methods, folder,
                seed=recipe.seed, record=recipe.model_dump(mode="json"), processes=processes, log=self._log,
                resume=found, evaluate_first=source is not None,
            )  # fmt: skip
        else:
            wrapped = model
        weights = checkpoint.weights(wrapped)
        if processes.main:
            self._save(weights, config, corpus, self._tokenizer, folder, dtype, stage, count, methods)
        processes.wait()

    def compress(self, stage: ResolvedStage, folder: Path) -> None:
        """Packs a finished stage's model, if the stage asks for it and unless a run before a kill has."""
        if self._processes.main and stage.compress is not None and not (folder / "packed").exists():
            self._log("compressing")
            texts = self._calibration(stage)
            self._tools.compress(folder, stage.compress, texts, folder / "packed", self._recipe.seed)
        self._processes.wait()

    def _calibration(self, stage: ResolvedStage) -> list[str]:
        documents = training_documents(stage.data, self._recipe.seed, self._out / "data")[:CALIBRATION_DOCUMENTS]
        return [document.text for document in documents]

    def _model(
        self, stage: ResolvedStage, source: Path | None, folder: Path, corpus: Corpus, texts: Sequence[str]
    ) -> tuple[PreTrainedModel, Any]:
        """The float32 model that the stage trains, pruned if it asks for that, and its config."""
        recipe, processes = self._recipe, self._processes
        if source is None:
            assert recipe.model is not None and recipe.data.vocab_size is not None
            fresh = build_model(recipe.model, recipe.data.vocab_size, stage.training.context)
            if stage.prune is None:
                return fresh, fresh.config
            source = folder / "initial"
            if processes.main and not (source / "config.json").is_file():
                fresh.save_pretrained(source)
                save_tokenizer(corpus.tokenizer, source, stage.training.context)
        if stage.prune is not None:
            pruned = folder / "pruned"
            if processes.main and not (pruned / "config.json").is_file():
                self._log("pruning")
                self._tools.prune(source, stage.prune, texts, pruned, recipe.seed)
            if processes.main:
                for rest in folder.glob("pruned-*"):  # of a pruning that was killed at its end
                    shutil.rmtree(rest)
            processes.wait()
            source = pruned
        model = load_dense(source)
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and stage.training.context > context:
            raise UserError(
                f"expected a context of at most the model's {context} tokens, found {stage.training.context}; "
                "set training.context"
            )
        return model, model.config

    def _teacher(self, name: str) -> PreTrainedModel:
        if not name:
            raise UserError("expected a teacher for squarehead, found none; name a folder, 'start' or an earlier stage")
        return load_dense(self._named(name))

    def _named(self, name: str) -> Path:
        """The dense folder of an earlier stage, of the recipe's start, or of any model."""
        if name in self._folders:
            return self._folders[name]
        with self._processes.main_first():
            return self._tools.folder(name, self._out / f"unpacked-{Path(name).name}")

    def _save(
        self,
        weights: dict[str, Tensor],
        config: Any,
        corpus: Corpus,
        tokenizer: Path | None,
        folder: Path,
        dtype: torch.dtype,
        stage: ResolvedStage,
        processes: int,
        methods: Sequence[TrainingMethod],
    ) -> None:
        save_model(weights, config, folder, dtype)
        context = stage.training.context
        if tokenizer is None:
            save_tokenizer(corpus.tokenizer, folder, context)
        else:
            copy_tokenizer(tokenizer, folder)
        # Read back: figures are those of the rounded weights.
        saved = load_dense(folder)
        zeros = sparsity(saved)
        if any(map(describes, methods)):
            packed = folder
            if self._recipe.stages:
                # The stage's own folder stays dense, for the next stage to start from.
                packed = folder / "packed"
                save_model(weights, config, packed, torch.bfloat16)
                copy_tokenizer(folder, packed)
            if self._tools.pack(packed, methods):
                saved = self._tools.load(packed)
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
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stage": stage.name,
            "recipe": self._recipe.model_dump(mode="json"),
        }
        checkpoint.write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def describes(method: TrainingMethod) -> bool:
    """Whether plain weights are not all that the method leaves."""
    return type(method).describe is not TrainingMethod.describe


def load_dense(folder: Path) -> PreTrainedModel:
    """A dense checkpoint in float32."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or ["nothing"])[0]
        raise UserError(f"expected a model that transformers loads in {folder}, found: {line}") from None
    return model


def save_model(weights: dict[str, Tensor], config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes weights by name as a transformers checkpoint in ``dtype``."""
    model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False)} - set(weights)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.to(dtype).save_pretrained(folder)


def sparsity(model: nn.Module) -> float:
    """Share of exact zeros in the decoder's linears."""
    zeros = total = 0
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            zeros += int((module.weight == 0).sum())
            total += module.weight.numel()
    return zeros / max(total, 1)


def read_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer of a model folder. Raises ``UserError`` without one, or without an end of text."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"expected tokenizer.json in {folder}, found none; take a model with a fast tokenizer")
    end = AutoTokenizer.from_pretrained(folder, local_files_only=True).eos_token_id
    if end is None:
        end = AutoConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise UserError(f"expected an end-of-text token in {folder}, found none; set eos_token in its tokenizer")
    return Vocabulary(Tokenizer.from_file(str(file)), int(end))


def copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _claim(recipe: TrainRecipe, out: Path, resume: bool) -> None:
    """Raises ``UserError`` unless ``out`` is new, or holds the run to go on with. A road that failed before its first
    checkpoint leaves nothing that counts: it may be started again with another recipe.
    """
    record, steps = out / "recipe.json", out / "stages"
    begun = any(steps.glob("*/run.json")) or any(steps.glob("*/checkpoints/step-*"))
    same = record.is_file() and _on_the_curve(TrainRecipe.model_validate_json(record.read_text())) == _on_the_curve(
        recipe
    )
    passing = {"data"} if begun else {"data", "recipe.json", "recipe.json.partial", "stages", "start"}
    if not resume and out.exists() and any(entry.name not in passing for entry in out.iterdir()):
        raise UserError(
            f"expected {out} to be empty, found files; try another folder, or --resume to go on with its run"
        )
    if not recipe.stages:
        return
    if begun and not same:
        raise _other_recipe(out)
    if not same:
        shutil.rmtree(steps, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(record, recipe.model_dump_json(indent=1) + "\n")


def _other_recipe(out: Path) -> UserError:
    return UserError(
        f"expected the recipe that {out} was started with, found another; try that one, or another output folder"
    )


def _find_checkpoint(recipe: TrainRecipe, out: Path, resume: bool) -> Path | None:
    """The checkpoint of a single stage to go on from, if any. Raises ``UserError`` if ``recipe`` would leave the curve
    it is on.
    """
    found = checkpoint.latest(out / "checkpoints") if resume else None
    if found is None:
        return None
    step, content = checkpoint.read_state(found)
    old = TrainRecipe.model_validate(content)
    if _on_the_curve(old) != _on_the_curve(recipe):
        raise _other_recipe(out)
    lengths = [old.training, recipe.training]
    # A method's schedule depends on the length from the first step on.
    decay = 0 if recipe.methods else min(length_matters_from(t) for t in lengths)
    if lengths[0].steps != lengths[1].steps and step > decay:
        raise UserError(
            f"expected the number of tokens to stay {lengths[0].tokens} once the decay has begun, "
            f"found {lengths[1].tokens} at step {step}; try the old number"
        )
    return found


def _on_the_curve(recipe: TrainRecipe) -> dict[str, Any]:
    """What a resumed run must share: all but the length of a single stage, checked apart, and what only changes the
    records.
    """
    content = recipe.model_dump(exclude={"training": RECORDS | (set() if recipe.stages else {"tokens"})})
    for stage in content["stages"]:
        stage["training"] = {k: v for k, v in stage["training"].items() if k not in RECORDS}
    return content


def _conclude(recipe: TrainRecipe, folders: Sequence[Path], out: Path) -> None:
    """The last stage's model, in bf16, the curve of the whole road and a record of every stage."""
    last = folders[-1]
    if any(map(describes, make_methods(recipe.resolved()[-1].methods))):
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
            place = {"stage": record["stage"], "step": row["step"] + steps, "tokens": row["tokens"] + tokens}
            rows.append(row | place)
        if own:
            tokens, steps = tokens + own[-1]["tokens"], steps + own[-1]["step"]
        boundaries.append(tokens)
        kept = ("stage", "held_out_bits_per_byte", "sparsity", "tokens_seen")
        stages.append({key: record[key] for key in kept})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if any(math.isfinite(row.get("loss", math.nan)) for row in rows):
        draw_curve(rows, out / "curve.png", boundaries[:-1])
    record = {
        "stages": stages,
        "held_out_bits_per_byte": stages[-1]["held_out_bits_per_byte"],
        "sparsity": stages[-1]["sparsity"],
        "tokens_seen": tokens,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recipe": recipe.model_dump(mode="json"),
    }
    checkpoint.write_text(out / "run.json", json.dumps(record, indent=1) + "\n")


__all__ = ["Tools", "TrainingMethod", "load_dense", "run", "sparsity"]
