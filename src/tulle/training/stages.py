"""The stages of a planned run, one after the other.

A stage: its corpus, the model it starts from, pruned if it asks for that; training with its methods; what it leaves;
and a packed copy if it asks for one. Every step is skipped that a run before a kill has finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tulle.methods.train.method import TrainingMethod
from tulle.methods.train.squarehead import SquareHead
from tulle.training import checkpoint
from tulle.training.corpus import Corpus, prepare
from tulle.training.loop import fit
from tulle.training.model_folder import dense_folder, load_dense
from tulle.training.outcome import conclude, save_stage
from tulle.training.plan import START, Plan, PlannedStage
from tulle.training.processes import Processes
from tulle.training.prune import pack_stage, prune


def run_stages(plan: Plan, out: Path, resume: Path | None, processes: Processes, log: Callable[[str], None]) -> None:
    """Runs all stages of ``plan`` into ``out``; ``resume`` is the checkpoint that a single stage continues from.

    Raises ``UserError`` for models, text and settings that do not fit together.
    """
    pipeline = _Pipeline(plan, out, processes, log)
    if plan.single:
        pipeline.train(plan.stages[0], out, resume)
        return
    folders: list[Path] = []
    for number, stage in enumerate(plan.stages, 1):
        log(f"stage {number} of {len(plan.stages)}: {stage.name}")
        folder = out / "stages" / f"{number:02d}-{stage.name}"
        if not (folder / "run.json").is_file():
            pipeline.train(stage, folder, checkpoint.latest(folder / "checkpoints"))
        pipeline.passed(stage, folder)
        pipeline.pack(stage, folder)
        folders.append(folder)
    if processes.main:
        conclude(plan, folders, out)
    processes.wait()


class _Pipeline:
    """What stages share: the models they may start from, the tokenizer, the folder of tokens."""

    def __init__(self, plan: Plan, out: Path, processes: Processes, log: Callable[[str], None]):
        self.plan, self.out, self.processes, self.log = plan, out, processes, log
        self.data = out / "data"
        self.folders: dict[str, Path] = {}
        """Dense model folders by the names that a recipe calls them."""
        self.tokenizer: Path | int = plan.vocab_size
        """The folder whose tokenizer everything is read with; before a new model has one, its size."""
        if plan.start is not None:
            self.tokenizer = self.folders[START] = self._dense(plan.start, "start")

    def passed(self, stage: PlannedStage, folder: Path) -> None:
        """Later stages may start from this one's model, and read text as it does."""
        self.folders[stage.name] = folder
        if isinstance(self.tokenizer, int):
            self.tokenizer = folder

    def train(self, stage: PlannedStage, folder: Path, resume: Path | None) -> None:
        """One stage into its folder: a checkpoint and its records."""
        plan, processes = self.plan, self.processes
        folder.mkdir(parents=True, exist_ok=True)
        source = None if stage.source is None else self._folder(stage.source)
        methods = self._methods(stage)
        with processes.main_first():
            corpus = prepare(stage.data, plan.seed, self.data, self.tokenizer)
        self.log(
            f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held-out tokens "
            f"of {corpus.held_out_bytes:,} bytes"
        )
        torch.manual_seed(plan.seed)
        model = self._starting_model(stage, source, folder, corpus)
        config = model.config
        if stage.training.steps:
            weights = fit(
                model, corpus, stage.training, methods, folder,
                seed=plan.seed, record=plan.record, processes=processes, log=self.log,
                resume=resume, evaluate_first=source is not None,
            )  # fmt: skip
        else:
            weights = checkpoint.weights(model)
        if processes.main:
            save_stage(plan, stage, folder, weights, config, corpus, methods, processes.count)
        processes.wait()

    def pack(self, stage: PlannedStage, folder: Path) -> None:
        """Packs a finished stage's model, if the stage asks for it and unless a run before a kill has."""
        if self.processes.main and stage.compress is not None and not (folder / "packed").exists():
            self.log("compressing")
            pack_stage(folder, stage.compress, stage.data, folder / "packed", seed=self.plan.seed, cache=self.data)
        self.processes.wait()

    def _methods(self, stage: PlannedStage) -> list[TrainingMethod]:
        methods = [replace(method) for method in stage.methods]
        for method in methods:
            if isinstance(method, SquareHead):
                folder = self._folder(method.teacher)
                teacher = load_dense(folder)
                method.teach(teacher)
        return methods

    def _folder(self, name: str) -> Path:
        """The dense folder of an earlier stage, of the recipe's start, or of any model."""
        return self.folders[name] if name in self.folders else self._dense(name, f"unpacked-{Path(name).name}")

    def _dense(self, model: str, work: str) -> Path:
        with self.processes.main_first():
            return dense_folder(model, self.out / work)

    def _starting_model(
        self, stage: PlannedStage, source: Path | None, folder: Path, corpus: Corpus
    ) -> PreTrainedModel:
        """The float32 model that the stage trains, pruned if it asks for that."""
        context = stage.training.context
        if source is None:
            assert self.plan.new is not None
            model = self.plan.new.build(self.plan.vocab_size, context)
            if stage.prune is None:
                return model
            source = folder / "initial"
            if self.processes.main and not (source / "config.json").is_file():
                model.save_pretrained(source)
                corpus.vocabulary.write_to(source, context)
        if stage.prune is not None:
            pruned = folder / "pruned"
            if self.processes.main and not (pruned / "config.json").is_file():
                self.log("pruning")
                prune(source, stage.prune, stage.data, pruned, seed=self.plan.seed, cache=self.data)
            if self.processes.main:
                for rest in folder.glob("pruned-*"):  # of a pruning that was killed at its end
                    shutil.rmtree(rest)
            self.processes.wait()
            source = pruned
        return load_dense(source, context)
