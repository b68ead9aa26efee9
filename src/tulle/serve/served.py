"""One model as it is served: its engine, its thread, and what a request needs to know of it."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.engine.kv_cache import PAGE
from tulle.engine.request import Constraint
from tulle.errors import UserError
from tulle.serve.errors import ApiError
from tulle.serve.facts import Facts
from tulle.serve.token_text import TokenTexts
from tulle.serve.worker import Scheduler, Worker
from tulle.text.chat_template import DEFAULT, WITH_TOOLS, variables_of
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats import ToolFormat, detect

if TYPE_CHECKING:
    from tulle.engine.grammar import Kind

SHORT = 8192
"""Characters up to which a text is tokenized on the event loop; longer ones are in a thread."""
SWITCHES = ("enable_thinking", "thinking")
"""How templates call their switch for reasoning: most; DeepSeek and Granite 3."""
GENERATION_CONFIG = "generation_config.json"
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
"""What of ``generation_config.json`` counts where a request says nothing."""


class EngineLike(Protocol):
    """What the server uses of :class:`tulle.engine.Engine`."""

    context: int
    hidden: int
    vocabulary: int
    config: dict[str, Any]

    @property
    def text(self) -> ModelTokenizer: ...

    @property
    def scheduler(self) -> Scheduler: ...


class ServedModel:
    """A loaded model."""

    def __init__(self, name: str, engine: EngineLike, worker: Worker, folder: Path | None, facts: Facts):
        self.name, self.engine, self.worker, self.facts = name, engine, worker, facts
        self.text = engine.text
        self.room = room_of(engine)
        self.tokens = TokenTexts(self.text)
        self.format: ToolFormat = detect(self.text, str(engine.config.get("model_type", "")))
        self.defaults = sampling_defaults(folder)
        self._grammars: Any = None
        templates = [self.text.templates.get(name, "") for name in (WITH_TOOLS, DEFAULT)]
        self.variables: frozenset[str] = frozenset().union(*map(variables_of, templates))
        """What the chat template reads beside the conversation."""
        longest = max((len(token.encode()) for token in self.text.tokenizer.get_vocab()), default=1)
        self._longest_prompt = (self.room + 1) * max(longest, 8)
        """Characters that no prompt which fits can exceed."""
        facts.chat = bool(self.text.templates)
        facts.tools = self.format.supports_tools
        facts.reasoning = self.format.reasoning is not None
        facts.defaults = {"temperature": 1.0, **self.defaults}

    def thinking(self, wanted: bool) -> dict[str, bool]:
        """The template's switch for reasoning; {} where it has none."""
        return next(({name: wanted} for name in SWITCHES if name in self.variables), {})

    async def off_loop(self, size: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function's result; in a thread where ``size`` characters make it slow."""
        return function(*arguments) if size <= SHORT else await asyncio.to_thread(function, *arguments)

    def encode(self, text: str, special: bool) -> list[int]:
        """Tokens of a prompt. Raises ``ApiError`` for one that cannot fit, before it is tokenized."""
        if len(text) > self._longest_prompt:
            raise self.too_long(f"{len(text)} characters")
        return self.text.encode(text, special=special)

    def too_long(self, found: str) -> ApiError:
        """400 for a prompt beyond the context."""
        return ApiError(
            400,
            f"expected a prompt of at most {self.room - 1} tokens, found {found}; shorten it, or raise --context",
            param="messages",
            code="context_length_exceeded",
        )

    def check_prompt(self, tokens: Sequence[int], generates: bool = True) -> None:
        """Raises ``ApiError`` for tokens that are none of the model's, none at all, or too many."""
        if not len(tokens):
            raise ApiError(400, "expected a prompt of at least one token, found none", param="prompt")
        if len(tokens) > self.room - (1 if generates else 0):
            raise self.too_long(str(len(tokens)))
        if max(tokens) >= self.engine.vocabulary:
            raise ApiError(400, f"expected tokens below {self.engine.vocabulary}, found {max(tokens)}", param="prompt")

    async def constraint(self, kind: Kind, text: str) -> Callable[[], Constraint]:
        """Compiles a grammar in a thread. Raises ``UserError`` for one that is wrong or too large."""
        return await asyncio.to_thread(self._compile, kind, text)

    def _compile(self, kind: Kind, text: str) -> Callable[[], Constraint]:
        from tulle.engine.grammar import Grammar, Grammars

        if self._grammars is None:
            self._grammars = Grammars(self.text, vocabulary=self.engine.vocabulary)
        return self._grammars.compile(Grammar(kind, text))


def room_of(engine: EngineLike) -> int:
    """Tokens that one sequence may have."""
    return min(engine.context, engine.scheduler.cache.pages * PAGE)


def sampling_defaults(folder: Path | None) -> dict[str, float]:
    """Sampling settings of ``generation_config.json``, as far as they are numbers in range."""
    try:
        content = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("do_sample") is False:
        return {}
    found = {name: content[name] for name in DEFAULTS if type(content.get(name)) in (int, float)}
    try:
        from tulle.engine.sampling import Sampling

        Sampling(**found)
    except (UserError, TypeError):
        return {}
    return found


def random_seed() -> int:
    """For a request that gives none."""
    return secrets.randbits(48)


def normalised(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1; a vector of zeros stays."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else (vector / length).astype(np.float32)
