"""The training recipe: typed YAML, unknown keys rejected with the nearest valid name.

One run, or a road of stages::

    start: reference              # or model: {hidden_size: …} for a new one
    data: {sources: [{name: stdlib}]}
    training: {tokens: 2_000_000, context: 512, batch: 16, learning_rate: 3.0e-4, schedule: linear}
    stages:
      - {name: sparse50, prune: {steps: [sparsegpt: {sparsity: 0.5}]}, methods: [held_masks: {}]}
      - {name: sparse70, prune: {steps: [sparsegpt: {sparsity: 0.7}]}, methods: [held_masks: {}]}
      - {name: task, data: {sources: [{path: task.jsonl}]}, methods: [held_masks: {}, squarehead: {teacher: start}]}

Each stage starts from the model that the one before it left (or where it says), prunes it if told to, trains with its
methods, and takes what it does not say itself from the recipe.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod, method_class
from tulle.training.architecture import OtherModel, kind


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Strict):
    """A Llama: the names are transformers' ``LlamaConfig``'s."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    tie_word_embeddings: bool = True


AnyModel = Annotated[Annotated[Model, Tag("llama")] | Annotated[OtherModel, Tag("other")], Discriminator(kind)]


class Source(_Strict):
    """Where text comes from: exactly one of ``name``, ``path`` and ``dataset``."""

    name: str | None = None
    """``stdlib``, or an installed distribution, of which the Python source is taken."""
    path: str | None = None
    """A text file, a JSONL file or a folder of these."""
    dataset: str | None = None
    """A data set of the hub, read through the ``datasets`` library."""
    config: str | None = None
    """Of the data set."""
    split: str = "train"
    """Of the data set."""
    documents: int | None = Field(default=None, gt=0)
    """So many from the first on; None: all."""
    separator: str | None = None
    """Cuts text files into documents."""
    template: str | None = None
    """Makes a document of a JSONL row or a data set's row: ``"Question: {question}\\nAnswer: {answer}"``. None: its
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


class Training(_Strict):
    """The loop's settings. One optimizer step sees ``batch * accumulation * context`` tokens, on all processes
    together.
    """

    tokens: int = Field(ge=0)
    context: int = Field(gt=1)
    batch: int = Field(gt=0)
    accumulation: int = Field(default=1, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(gt=0)
    schedule: Literal["wsd", "linear", "cosine", "constant"] = "wsd"
    """After the warm-up: ``wsd`` stays and falls by 1 − √t over ``decay_fraction`` of the steps; ``linear`` and
    ``cosine`` fall to 0 from there on."""
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    evaluate_every: int = Field(default=250, gt=0)
    evaluate_windows: int = Field(default=128, gt=0)
    checkpoint_every: int = Field(default=250, gt=0)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.accumulation * self.context

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.tokens // self.step_tokens


class Stage(_Strict):
    """One stretch of the road. What it does not say is the recipe's."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    start: str | None = None
    """Where it starts instead of where the stage before it ended: an earlier stage, ``start`` (the recipe's), or a
    model."""
    prune: str | dict[str, Any] | None = None
    """A compression recipe (its content, a file, or a shipped one's name) of steps that prune, or larosa, applied
    before training."""
    training: dict[str, Any] = {}
    """Settings that differ from the recipe's ``training``; ``tokens: 0`` only prunes."""
    methods: list[dict[str, Any]] = []
    data: TextData | None = None
    compress: str | dict[str, Any] | None = None
    """A compression recipe applied after training; the packed model goes into ``packed`` beside the stage's model."""


class TrainRecipe(_Strict):
    """One reproducible training run."""

    seed: int = 0
    start: str | None = None
    """A model to go on from: a folder (dense, or packed by ``tulle compress``), ``reference`` or a hub id."""
    model: AnyModel | None = None
    data: Data
    training: Training
    methods: list[dict[str, Any]] = []
    stages: list[Stage] = []
    """None: one stage of these settings."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if (self.start is None) == (self.model is None):
            raise ValueError("give either model, for a new one, or start, a model to go on from")
        if isinstance(self.model, Model) and self.model.num_attention_heads % self.model.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
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
        for stage in self.resolved():
            make_methods(stage.methods)
            if not stage.training.steps and (stage.training.tokens or not (stage.prune or stage.compress)):
                raise ValueError(f"tokens must cover one step of {stage.training.step_tokens} tokens")
        return self

    def resolved(self) -> list[ResolvedStage]:
        """The stages with everything said."""
        if not self.stages:
            return [ResolvedStage(name="train", training=self.training, methods=self.methods, data=self.data)]
        return [
            ResolvedStage(
                name=stage.name,
                start=stage.start,
                prune=stage.prune,
                training=_merged(stage, self.training),
                methods=stage.methods,
                data=stage.data or self.data,
                compress=stage.compress,
            )
            for stage in self.stages
        ]


class ResolvedStage(_Strict):
    """A stage with everything said."""

    name: str
    start: str | None = None
    prune: str | dict[str, Any] | None = None
    training: Training
    methods: list[dict[str, Any]]
    data: TextData
    compress: str | dict[str, Any] | None = None


def _merged(stage: Stage, training: Training) -> Training:
    try:
        return Training.model_validate(training.model_dump() | stage.training)
    except ValidationError as error:
        raise UserError(f"stage {stage.name}: {_one_line(error, Training)}") from None


def make_methods(settings: list[dict[str, Any]]) -> list[TrainingMethod]:
    """The methods of a list such as ``[{"held_masks": {}}, {"squarehead": {"kl": 1.0}}]``.

    Raises ``UserError`` for unknown names and settings.
    """
    made = []
    for entry in settings:
        if len(entry) != 1:
            raise UserError(
                f"expected one method per entry of methods, found {', '.join(entry) or 'none'}; start each with '- '"
            )
        ((name, given),) = entry.items()
        cls = method_class(name)
        given = given or {}
        valid = sorted(TypeAdapter(cls).json_schema()["properties"])
        for key in given:
            if key not in valid:
                near = difflib.get_close_matches(key, valid, n=1, cutoff=0.4)
                advice = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
                raise UserError(f"unknown key 'methods.{name}.{key}'; {advice}")
        try:
            made.append(TypeAdapter(cls).validate_python(given))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"expected 'methods.{name}.{where}' to be valid, found: {first['msg']} (got {first.get('input')!r})"
            ) from None
    return made


def load_recipe(path: Path) -> TrainRecipe:
    """Read and check a recipe. Raises ``UserError`` with one line that names the key at fault."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"expected a training recipe at {path}, found no such file; try recipes/reference.yaml"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected {path} to be a readable YAML recipe, found: {reason}; try to mend the file"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"expected {path} to map keys to values, found {type(content).__name__}; see recipes/reference.yaml"
        )
    try:
        return TrainRecipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def _one_line(error: ValidationError, top: type[BaseModel] = TrainRecipe) -> str:
    first = error.errors()[0]
    location = tuple(part for part in first["loc"] if part not in ("llama", "other"))  # tags of AnyModel
    where = ".".join(map(str, location)) or "recipe"
    if first["type"] != "extra_forbidden":
        message = " ".join(first["msg"].split())
        return f"expected '{where}' to be valid, found: {message} (got {_short(first.get('input'))})"
    valid = _valid_keys(location[:-1], top)
    near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key '{where}'; {advice}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _valid_keys(location: tuple[int | str, ...], top: type[BaseModel]) -> list[str]:
    section = top
    children: dict[str, type[BaseModel]] = {
        "model": Model,
        "data": TextData if "stages" in location else Data,
        "training": Training,
        "sources": Source,
        "held_out": Source,
        "stages": Stage,
    }
    for part in location:
        section = children.get(str(part), section)
    return sorted(section.model_fields)
