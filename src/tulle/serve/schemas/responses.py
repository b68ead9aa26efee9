"""OpenAI's responses: requests and answers. Nothing is stored: a conversation is sent whole each time."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from tulle.serve.schemas.common import MOST_LOGPROBS, Generating, Name, Strict, at_most
from tulle.serve.schemas.openai import StreamOptions

TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


class InputPart(Strict):
    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> InputPart:
        if self.type not in TEXT_PARTS:
            raise ValueError(f"expected a part of type input_text, found {self.type!r}: the model reads text alone")
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"expected a text in a part of type {self.type}, found none")
        return self


Parts = Annotated[list[InputPart], Field(max_length=1024, fail_fast=True)]


class Item(Strict):
    """A message, a call, a result of one, or reasoning; its ``type`` says which fields it has."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: Annotated[str, Field(max_length=256)] | None = None
    name: Name | None = None
    arguments: str | None = None
    output: str | Parts | None = None

    @model_validator(mode="after")
    def _complete(self) -> Item:
        needed = {
            "message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }.get(self.type, ())  # fmt: skip
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"expected {name} in an item of type {self.type}, found none")
        return self


class ResponseTool(Strict):
    type: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_function(self) -> ResponseTool:
        if self.type != "function":
            raise ValueError(f"expected tools of type function, found {self.type!r}: this server runs none itself")
        if self.name is None:
            raise ValueError("expected a name of a tool, found none")
        return self


class NamedChoice(Strict):
    type: Literal["function"]
    name: Name


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("expected a schema in a format of type json_schema, found none")
        return self


class TextSettings(Strict):
    format: TextFormat | None = None
    verbosity: None = None
    """Not supported."""


class ReasoningSettings(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Not made: what the model thinks is given as it is."""


class ResponsesRequest(Generating):
    """``POST /v1/responses``."""

    refused: ClassVar[dict[str, str]] = Generating.refused | {
        "previous_response_id": "nothing is stored; send the whole conversation as input",
        "conversation": "nothing is stored; send the whole conversation as input",
        "prompt": "there are no stored prompts",
        "max_tool_calls": "this server runs no tools",
        "response_format": "send it as text.format",
        "n": "a response has one answer",
        "context_management": "conversations are not shortened",
    }

    input: str | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=32, fail_fast=True)] | None = None
    """What else the answer should hold; log-probabilities are known, the rest is passed over."""
    store: bool | None = None
    """Nothing is stored, whatever this says."""
    metadata: (
        Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], at_most(16)] | None
    ) = None
    """Given back as it is."""


class ResponseObject(BaseModel):
    """The answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
