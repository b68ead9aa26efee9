"""What a server is told when it starts: options of the command line, or the same names in a YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tulle.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)


def size(value: Any) -> Any:
    """Bytes of ``4GB``, ``512 MiB`` or a plain number."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value)
    if not found:
        raise ValueError(f"expected a size such as 512MB or 4GiB, found {value!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


Size = Annotated[int, BeforeValidator(size), Field(gt=0)]


class Settings(BaseModel):
    """All settings of a server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] = Field(min_length=1)
    """Folders, .gguf files, ``reference`` or hub ids; the first is loaded at once, the others when they are asked
    for."""
    served_name: list[str] = []
    """What clients call the models, in the same order [the folders' names]."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine's."""
    port: int = Field(8080, ge=0, le=65535)
    """0 takes one that is free."""
    api_key: list[str] = []
    """Keys that clients may use; none: everybody may."""
    api_key_file: Path | None = None
    """A file with a key per line."""
    allow_host: list[str] = []
    """Names by which clients may call a server on loopback, besides localhost; * for any."""
    cors: list[str] = []
    """Origins of web pages that may read answers, such as https://example.org; * for any."""
    threads: int | None = Field(None, ge=1)
    """Of the engine [all physical cores]."""
    sequences: int = Field(16, ge=1, le=1024)
    """Run at once; others wait."""
    context: int | None = Field(None, ge=1)
    """Tokens of a sequence, prompt included [the model's, at most 4096]."""
    cache: str = "auto"
    """Keys and values in f32, bf16, int8, int4, or as fits the model."""
    cache_memory: Size | None = None
    """Bytes of keys and values, such as 4GB [what ``sequences`` of ``context`` tokens take]."""
    activations: str = "as quantised"
    """Inputs of integer weights: as quantised, or int8."""
    head: str = "int8"
    """Output head in int8, int4, bf16, or as stored."""
    layout: str = "auto"
    """Of the weights; auto: the fastest here."""
    weights: str = "as stored"
    """Of a Scaling Transformer: f32, bf16, int8, or as stored."""
    deterministic: bool = False
    """Equal bits whatever else runs, of Scaling Transformers too; others have them anyway."""
    memory: Size | None = None
    """Of all loaded models together; those unused for longest make room [no bound]."""
    queue: int = Field(128, ge=0)
    """Sequences that wait at most; beyond, clients get 503."""
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Seconds that a request may take where it does not say itself [no bound]."""
    max_body: Size = 8 * 10**6
    """Bytes of a request."""
    log_prompts: bool = False
    """Write prompts and answers into the log."""
    drain_timeout: float = Field(60.0, ge=0, allow_inf_nan=False)
    """Seconds that running requests get to end after SIGTERM or Ctrl-C."""


def load(file: Path | None, given: dict[str, Any]) -> Settings:
    """``given`` (None counts as not given) over what a YAML file says. Raises ``UserError``."""
    content: Any = {}
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
            raise UserError(f"expected settings in YAML, found {file}: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"expected names and values in {file}, found {type(content).__name__}")
        content = {str(name).replace("-", "_"): value for name, value in content.items()}
    try:
        return Settings.model_validate(content | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"expected another value of {name}: {message}; see tulle serve --help") from None
