"""What all requests share: how unknown fields are met, sampling settings, bounds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tulle.serve.errors import unsupported

MOST_CHOICES = 32
"""Answers to one prompt."""
MOST_STOPS, LONGEST_STOP = 64, 1000
MOST_TEXTS = 256
"""Prompts or inputs of one request."""
MOST_TOKENS = 1 << 20
"""Of a prompt that is given as tokens, before the model's context is looked at."""
LONGEST_GRAMMAR = 1 << 16
MOST_BIASES = 1024
MOST_LOGPROBS = 20

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Name = Annotated[str, Field(max_length=256)]


def at_most(count: int) -> BeforeValidator:
    """Refuses a larger object before its entries are looked at, each of which could be an error of its own."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"expected at most {count} entries, found {len(value)}")
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    """No guesses: a number is no string, NaN no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", protected_namespaces=())


class Body(Strict):
    """A request. A field that is not known may change the answer, so it is refused by name, unless it is null."""

    model_config = ConfigDict(extra="allow")

    harmless: ClassVar[frozenset[str]] = frozenset({"user", "metadata"})
    """Accepted and not read: they change no answer."""
    refused: ClassVar[dict[str, str]] = {}
    """What is wrong with a field that clients do send."""

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in self.harmless:
                continue
            if name in self.refused:
                raise unsupported(name, f"expected no {name}: {self.refused[name]}")
            raise unsupported(name, f"expected fields that this server knows, found {name[:100]!r}; leave it out")
        return self


class Generating(Body):
    """Settings of every request that generates text. What is not given is as the model's ``generation_config.json``
    says, or neutral."""

    harmless: ClassVar[frozenset[str]] = frozenset({
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "cache_prompt", "id_slot", "chat_id", "session_id",
    })  # fmt: skip
    refused: ClassVar[dict[str, str]] = {
        "chat_template": "templates of requests are not run; the model's own is used",
        "functions": "send them as tools",
        "function_call": "send it as tool_choice",
        "audio": "the model answers in text",
        "modalities": "the model answers in text",
        "web_search_options": "this server searches nothing",
        "prediction": "predicted outputs are not supported",
    }

    model: Annotated[str, Field(max_length=1024)] = ""
    """A name of ``/v1/models``; empty: the first."""
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    dry_multiplier: float | None = Field(None, ge=0, le=100)
    dry_base: float | None = Field(None, ge=1, le=100)
    dry_allowed_length: int | None = Field(None, ge=0, lt=2**31)
    dry_penalty_last_n: int | None = Field(None, ge=-1, lt=2**31)
    dry_sequence_breakers: list[Annotated[str, Field(min_length=1, max_length=40)]] | None = Field(None, max_length=32)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    repeat_last_n: int | None = Field(None, ge=-1, lt=2**31)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(max_length=10)], Annotated[float, Field(ge=-100, le=100)]], at_most(MOST_BIASES)
        ]
        | None
    ) = None
    """By token id."""
    seed: int | None = Field(None, ge=0, lt=2**62)
    """Equal seeds give equal answers; of n answers, the i-th has ``seed`` + i."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    """Go on after an end token."""
    grammar: Annotated[str, Field(min_length=1, max_length=LONGEST_GRAMMAR)] | None = None
    """A grammar (Lark, or GBNF as llama.cpp has it) that the answer follows."""
    regex: Annotated[str, Field(min_length=1, max_length=LONGEST_GRAMMAR)] | None = None
    """A regular expression that the whole answer matches."""
    timeout: float | None = Field(None, gt=0, le=86400)
    """Seconds until the answer ends with what there is."""

    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's shape of errors."""

    error: ErrorBody


def extras(value: Any) -> dict[str, Any]:
    """Fields of a part of a request that no schema names."""
    return {name: item for name, item in (value.model_extra or {}).items() if item is not None}
