"""OpenAI's requests and answers: chat, completions, embeddings, models; and those of this server in their style."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tulle.serve.schemas.common import (
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_TEXTS,
    Body,
    Generating,
    Name,
    Strict,
    Tokens,
    Usage,
    at_most,
)

# Chat ------------------------------------------------------------------------------------------------------------


class Part(Strict):
    """A part of a message; only text is understood."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Part:
        if self.type not in ("text", "refusal"):
            raise ValueError(f"expected a part of type text, found {self.type!r}: the model reads text alone")
        if (self.text if self.type == "text" else self.refusal) is None:
            raise ValueError(f"expected a {self.type} in a part of that type, found none")
        return self


class CalledFunction(Strict):
    name: Name
    arguments: str
    """JSON."""


class CalledTool(Strict):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=1024, fail_fast=True)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"expected a content in a message of role {self.role}, found none")
        return self


class FunctionSpec(Strict):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments."""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: Name = "answer"
    description: str | None = None
    # A field called "schema" would hide a method of pydantic's.
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("expected json_schema.schema in a response_format of type json_schema, found none")
        return self


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(Generating):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """For models whose template knows it."""
    chat_template_kwargs: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")], Any], at_most(32)] | None
    ) = None
    """Values that the model's template reads, such as ``enable_thinking``."""


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class AnsweredFunction(BaseModel):
    name: str
    arguments: str


class AnsweredTool(BaseModel):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredTool] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnsweredMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None = None
    """``deadline`` where the time was up."""


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``; as a stream, its pieces as server-sent events."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


# Completions -----------------------------------------------------------------------------------------------------

Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
)


class CompletionRequest(Generating):
    """``POST /v1/completions``."""

    refused = Generating.refused | {"suffix": "the model cannot fill in; leave it out"}

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    """[16]"""
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    """So many are made, the ``n`` most likely ones per token are given."""
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None
    """Put the tokenizer's own tokens, such as BOS, before prompts that are text [true]."""

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"expected a best_of of at least n ({self.n or 1}), found {self.best_of}")
        if self.best_of is not None and self.stream and self.best_of > (self.n or 1):
            raise ValueError("expected no best_of above n in a stream: the best is known only at the end")
        return self


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None = None


class Completion(BaseModel):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


# Embeddings ------------------------------------------------------------------------------------------------------


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``."""

    model: Annotated[str, Field(max_length=1024)] = ""
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    """Only the model's own number."""
    pooling: Literal["mean", "last"] | None = None
    """Of the final hidden states: their mean over all tokens [default], or the last token's."""
    normalize: bool | None = None
    """To length 1 [true]."""
    timeout: float | None = Field(None, gt=0, le=86400)


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer of ``/v1/embeddings``."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


# Models ----------------------------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    loaded: bool
    context_length: int | None


class ModelList(BaseModel):
    """The answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


# Tokens and scores -----------------------------------------------------------------------------------------------


class TokenizeRequest(Body):
    """``POST /tokenize``: of a text, or of a conversation as the model sees it."""

    model: Annotated[str, Field(max_length=1024)] = ""
    content: str | None = None
    prompt: str | None = None
    """Another name of ``content``."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_special: bool | None = None
    """With what the tokenizer puts around a text, such as BOS [false]."""
    with_pieces: bool | None = None
    """Also the text of every token."""

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if sum(value is not None for value in (self.content, self.prompt, self.messages)) != 1:
            raise ValueError("expected one of content, prompt and messages")
        return self


class Tokenized(BaseModel):
    """The answer of ``/tokenize``."""

    tokens: list[int]
    count: int
    pieces: list[str] | None = None


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: Annotated[str, Field(max_length=1024)] = ""
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1 << 20, fail_fast=True)]
    keep_special: bool | None = None
    """With special tokens in the text."""


class Detokenized(BaseModel):
    """The answer of ``/detokenize``."""

    content: str


class ScoreRequest(Body):
    """``POST /v1/score``: log-probabilities of given continuations of a prompt, for evaluation."""

    model: Annotated[str, Field(max_length=1024)] = ""
    prompt: str | Tokens
    continuations: Annotated[list[str | Tokens], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
    timeout: float | None = Field(None, gt=0, le=86400)


class Score(BaseModel):
    index: int
    logprob: float
    """Sum over the continuation's tokens, in nats."""
    greedy: bool
    """Every token was the most likely one."""
    tokens: list[int]
    token_logprobs: list[float]


class Scores(BaseModel):
    """The answer of ``/v1/score``."""

    object: Literal["list"]
    data: list[Score]
    model: str
    usage: EmbeddingUsage
