"""The training recipe: typed YAML, unknown keys rejected with the nearest valid name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tulle.errors import UserError


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


class Source(_Strict):
    """Where text comes from; ``weight`` 2 takes each document twice per epoch, 0.5 half of them."""

    name: str
    weight: float = Field(default=1.0, gt=0)


class Data(_Strict):
    """The corpus and its tokenizer (a byte-level BPE trained on the training side)."""

    sources: list[Source] = Field(min_length=1)
    vocab_size: int = Field(ge=257, le=65_536)  # 256 bytes and <|endoftext|>; tokens are stored as uint16

    @model_validator(mode="after")
    def _each_once(self) -> Data:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("each source may be named once; raise its weight instead")
        return self


class Training(_Strict):
    """The loop's settings. One optimizer step sees ``batch * accumulation * context`` tokens."""

    tokens: int = Field(gt=0)
    context: int = Field(gt=1)
    batch: int = Field(gt=0)
    accumulation: int = Field(default=1, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    decay_fraction: float = Field(ge=0, le=1)
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


class TrainRecipe(_Strict):
    """One reproducible training run."""

    seed: int = 0
    model: Model
    data: Data
    training: Training

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if self.model.num_attention_heads % self.model.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.training.steps < 1:
            raise ValueError(f"tokens must cover one step of {self.training.step_tokens} tokens")
        return self


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


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "recipe"
    if first["type"] != "extra_forbidden":
        return f"expected '{where}' to be valid, found: {first['msg']} (got {_short(first.get('input'))})"
    valid = _valid_keys(first["loc"][:-1])
    near = difflib.get_close_matches(str(first["loc"][-1]), valid, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key '{where}'; {advice}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = TrainRecipe
    children: dict[str, type[BaseModel]] = {
        "model": Model,
        "data": Data,
        "training": Training,
        "sources": Source,
    }
    for part in location:
        section = children.get(str(part), section)
    return sorted(section.model_fields)
