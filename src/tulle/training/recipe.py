"""The training recipe: typed YAML, unknown keys rejected with the nearest valid name.

One run, or a pipeline of stages::

    start: reference              # or model: {hidden_size: …} for a new one
    data: {sources: [{name: stdlib}]}
    training: {tokens: 2_000_000, context: 512, batch: 16, learning_rate: 3.0e-4, schedule: linear}
    stages:
      - {name: sparse50, prune: {steps: [sparsegpt: {sparsity: 0.5}]}, methods: [held_masks: {}]}
      - {name: sparse70, prune: {steps: [sparsegpt: {sparsity: 0.7}]}, methods: [held_masks: {}]}
      - {name: task, data: {sources: [{path: task.jsonl}]}, methods: [held_masks: {}, squarehead: {teacher: start}]}

Each stage starts from the model that the one before it left, or where it says. It prunes that model if told to, and
trains it with its methods. What a stage does not say itself is the recipe's.

Here stands what may be written; :mod:`tulle.training.plan` works out what it means.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tulle.compression.recipe import read_yaml, recipes_folder
from tulle.errors import UserError
from tulle.training.architecture import TAGS, AnyModel, Llama, OtherModel

RENAMED = {"train-sparse-road": "train-sparse-pipeline"}
"""Shipped recipes by their old names."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where text comes from: exactly one of ``name``, ``path`` and ``dataset``."""

    name: str | None = None
    """``stdlib``, or an installed distribution, of which the Python source is taken."""
    path: str | None = None
    """A text file, a JSONL file or a folder of these."""
    dataset: str | None = None
    """A data set of the hub, read through the ``datasets`` library."""
    config: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Split of the data set."""
    documents: int | None = Field(default=None, gt=0)
    """The first so many documents; null: all."""
    separator: str | None = None
    """What separates the documents of a text file; null: a file is one document."""
    template: str | None = None
    """Makes a document of a JSONL row or a data set's row: ``"Question: {question}\\nAnswer: {answer}"``. Null: its
    ``text`` or ``content``."""
    weight: float = Field(default=1.0, gt=0)
    """2 takes each document twice per epoch, 0.5 half of them."""

    @model_validator(mode="after")
    def _one(self) -> Source:
        if sum(kind is not None for kind in (self.name, self.path, self.dataset)) != 1:
            raise ValueError("a source needs exactly one of name, path and dataset")
        return self

    @property
    def label(self) -> str:
        """What it is called in documents' names."""
        return str(self.name or self.path or self.dataset)


class TextData(_Strict):
    """What is trained on and what is evaluated on."""

    sources: list[Source] = Field(min_length=1)
    """Text to train on, see below; each may be named once."""
    held_out: list[Source] = []
    """Text for evaluation; none: the held-out modules of the standard library. Of a distribution, its held-out modules.
    Training documents that are in it are left out."""

    @model_validator(mode="after")
    def _each_once(self) -> TextData:
        names = [source.label for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("each source may be named once; raise its weight instead")
        return self


class Data(TextData):
    """The corpus and, for a new model, its tokenizer (a byte-level BPE trained on the training side)."""

    vocab_size: int | None = Field(default=None, ge=257, le=65_536)  # 256 bytes and <|endoftext|>
    """Tokens of a new model's tokenizer, 257 to 65,536. With ``start`` it is the start model's: leave it out."""


class Training(_Strict):
    """The loop's settings. One optimizer step sees ``batch * accumulation * context`` tokens, on all processes
    together.
    """

    tokens: int = Field(ge=0)
    """Tokens that the whole stage trains on; whole optimizer steps are taken."""
    context: int = Field(gt=1)
    """Tokens of a window."""
    batch: int = Field(gt=0)
    """Windows of a micro-batch, of all processes together."""
    accumulation: int = Field(default=1, gt=0)
    """Micro-batches of an optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: for the hidden matrices, with AdamW for the rest."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate, reached after the warm-up."""
    schedule: Literal["wsd", "linear", "cosine", "constant"] = "wsd"
    """After the warm-up: ``wsd`` stays and falls by 1 − √t over ``decay_fraction`` of the steps; ``linear`` and
    ``cosine`` fall to 0 from there on."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    decay_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, the last ones, in which ``wsd`` falls."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices, times the learning rate per step; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """β₁ and β₂ of AdamW."""
    clip: float = Field(default=1.0, gt=0)
    """The largest 2-norm of the gradient."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """``bf16``: autocast over float32 weights."""
    compile: bool = True
    """By ``torch.compile``; one process only."""
    evaluate_every: int = Field(default=250, gt=0)
    """Optimizer steps between two rows of ``metrics.jsonl``."""
    evaluate_windows: int = Field(default=128, gt=0)
    """About so many held-out windows give the estimate of a row."""
    checkpoint_every: int = Field(default=250, gt=0)
    """Optimizer steps between two checkpoints."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.accumulation * self.context

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.tokens // self.step_tokens


class Stage(_Strict):
    """One stage of a pipeline. What it does not say is the recipe's."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Its folder is named so, and later stages: letters, digits, ``.``, ``_``, ``-``."""
    start: str | None = None
    """Where it starts instead of where the stage before it ended: an earlier stage, ``start`` (the recipe's), or a
    model."""
    prune: str | dict[str, Any] | None = None
    """A compression recipe (its content, a file, or a shipped one's name) of steps that prune, or larosa, applied
    before training."""
    training: dict[str, Any] = {}
    """Settings that differ from the recipe's ``training``; ``tokens: 0`` only prunes."""
    methods: list[dict[str, Any]] = []
    """Training methods of this stage, in order, see below."""
    data: TextData | None = None
    """Text of this stage in place of the recipe's."""
    compress: str | dict[str, Any] | None = None
    """A compression recipe applied after training; the packed model goes into ``packed`` beside the stage's model."""


class TrainRecipe(_Strict):
    """One reproducible training run."""

    seed: int = Field(default=0, ge=0)
    """Of everything random: initial weights, the order of the windows."""
    start: str | None = None
    """A model to go on from: a folder (dense, or packed by ``tulle compress``), ``reference`` or a hub id."""
    model: AnyModel | None = None
    """A new model's sizes, see below. Exactly one of ``start`` and ``model``."""
    data: Data
    """The text, see below."""
    training: Training
    """The loop's settings, see below."""
    methods: list[dict[str, Any]] = []
    """Training methods, in order, see below. With stages, each has its own."""
    stages: list[Stage] = []
    """A pipeline, one stage after the other, see below; empty: one stage of these settings."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if (self.start is None) == (self.model is None):
            raise ValueError("give either model, for a new one, or start, a model to go on from")
        if self.model is not None and self.data.vocab_size is None:
            raise ValueError("data.vocab_size is needed for a new model")
        if isinstance(self.model, OtherModel) and self.data.vocab_size is not None:
            self.model.make_config(self.data.vocab_size, self.training.context)
        if self.start is not None and self.data.vocab_size is not None:
            raise ValueError("data.vocab_size is the start model's; leave it out")
        if self.stages and self.methods:
            raise ValueError("with stages, methods belong to each stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("each stage needs a name of its own")
        return self


def load_recipe(recipe: str | Path | Mapping[str, Any]) -> TrainRecipe:
    """A recipe from a YAML path, the name of a shipped one, or its content.

    Raises ``UserError`` with one line that names the key at fault.
    """
    if isinstance(recipe, Mapping):
        return _parsed(recipe, "the recipe")
    path = _path(recipe)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(
            f"expected {path} to map keys to values, found {type(content).__name__}; see recipes/reference.yaml"
        )
    return _parsed(content, path)


def shipped() -> list[str]:
    """Names of the shipped training recipes."""
    files = sorted(recipes_folder().glob("*.yaml"))
    return [file.stem for file in files if "training" in yaml.safe_load(file.read_text(encoding="utf-8"))]


def explain(error: ValidationError, section: type[BaseModel] = TrainRecipe) -> str:
    """One line on the first fault of a ``section`` of a recipe: the key, and the nearest valid one if it is unknown."""
    first = error.errors()[0]
    location = tuple(part for part in first["loc"] if part not in TAGS)
    where = ".".join(map(str, location)) or "recipe"
    if first["type"] != "extra_forbidden":
        message = " ".join(first["msg"].split())
        return f"expected '{where}' to be valid, found: {message} (got {_short(first.get('input'))})"
    valid = _valid_keys(location[:-1], section)
    near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key '{where}'; {advice}"


def _path(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    if str(recipe) in shipped():
        return recipes_folder() / f"{recipe}.yaml"
    if path.stem in RENAMED:
        raise UserError(
            f"expected a training recipe by its present name, found {path.stem}; it is {RENAMED[path.stem]} now"
        )
    if path.exists():
        raise UserError(f"expected a training recipe at {path}, found no file; name a YAML file")
    raise UserError(
        f"expected a training recipe at {path}, found no such file; shipped recipes: {', '.join(shipped())}"
    )


def _parsed(content: Mapping[str, Any], where: str | Path) -> TrainRecipe:
    try:
        return TrainRecipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _valid_keys(location: tuple[int | str, ...], top: type[BaseModel]) -> list[str]:
    section = top
    children: dict[str, type[BaseModel]] = {
        "model": Llama,
        "data": TextData if "stages" in location else Data,
        "training": Training,
        "sources": Source,
        "held_out": Source,
        "stages": Stage,
    }
    for part in location:
        section = children.get(str(part), section)
    return sorted(section.model_fields)
