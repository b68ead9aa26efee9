"""Anthropic's messages: requests and answers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from tulle.serve.schemas.common import LONGEST_STOP, MOST_STOPS, Body, Generating, Name, Strict

NO_DIFFERENCE = {
    "context_management", "cache_control", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id",
}  # fmt: skip
"""Fields of Anthropic's own service."""
READABLE = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class TextBlock(Strict):
    type: Literal["text"]
    text: str


class Block(Strict):
    """A part of a message; its ``type`` says which fields it has."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    thinking: str | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Annotated[str, Field(max_length=256)] | None = None
    content: str | Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)] | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> Block:
        if self.type not in READABLE:
            raise ValueError(
                f"expected a block of {', '.join(READABLE)}, found {self.type!r}: the model reads text alone"
            )
        needed = {
            "text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",),
            "thinking": ("thinking",),
        }.get(self.type, ())  # fmt: skip
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"expected {name} in a block of type {self.type}, found none")
        return self


class InputMessage(Strict):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=1024, fail_fast=True)]


class InputTool(Strict):
    type: Annotated[str, Field(max_length=64)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_ours_to_call(self) -> InputTool:
        if self.type not in (None, "custom"):
            raise ValueError(f"expected tools that the client runs, found {self.type!r}")
        if self.input_schema is None:
            raise ValueError(f"expected an input_schema of the tool {self.name}, found none")
        return self


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("expected a name with a tool_choice of type tool, and no other")
        return self


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    """Not read: a model stops thinking by itself."""


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """For models whose template knows it."""


class Prompted(Strict):
    """What both of Anthropic's routes read."""

    system: str | Annotated[list[TextBlock], Field(max_length=256, fail_fast=True)] | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    tools: Annotated[list[InputTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class CountRequest(Prompted, Body):
    """``POST /v1/messages/count_tokens``."""

    harmless: ClassVar[frozenset[str]] = Generating.harmless | NO_DIFFERENCE
    refused: ClassVar[dict[str, str]] = {"mcp_servers": "this server calls no others"}

    model: Annotated[str, Field(max_length=1024)] = ""
    output_config: OutputConfig | None = None


class MessagesRequest(Prompted, Generating):
    """``POST /v1/messages``."""

    harmless: ClassVar[frozenset[str]] = Generating.harmless | NO_DIFFERENCE
    refused: ClassVar[dict[str, str]] = Generating.refused | {
        "mcp_servers": "this server calls no others",
        "container": "this server runs nothing",
        "response_format": "send it as output_config.format",
    }

    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
            Field(max_length=MOST_STOPS, fail_fast=True),
        ]
        | None
    ) = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> MessagesRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "expected a last message of the user, found one of the assistant; prefill is not supported"
            )
        return self

    def stops(self) -> list[str]:
        return [*super().stops(), *(self.stop_sequences or ())]


class AnthropicUsage(BaseModel):
    input_tokens: int
    """Of the prompt, without those that were found in the cache."""
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class AnthropicMessage(BaseModel):
    """The answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: AnthropicUsage


class CountedTokens(BaseModel):
    """The answer of ``/v1/messages/count_tokens``."""

    input_tokens: int


class AnthropicErrorBody(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    """Anthropic's shape of errors."""

    type: Literal["error"]
    error: AnthropicErrorBody
