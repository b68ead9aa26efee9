"""What is asked of the engine, and what it answers: requests, sequences, events."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.engine.sampling import Sampling, TokenLogprobs
from tulle.errors import UserError

Finish = Literal["end", "stop", "length", "cancelled", "deadline", "error"]
"""Why a sequence ended: an end token, a stop string, its number of tokens, its client, its deadline, a fault."""


class Constraint(Protocol):
    """What of a vocabulary a sequence may choose next; a structured output's state. See :mod:`tulle.engine.grammar`."""

    def mask(self) -> NDArray[np.uint32] | None:
        """Allowed tokens, a bit each, ``[(V + 31) / 32]``, the lowest bit first; None: all of them.

        Called once before each token, beside the forward pass, in another thread.
        """

    def accept(self, token: int) -> None:
        """The token that was chosen."""

    @property
    def finished(self) -> bool:
        """Nothing may follow: the sequence ends as with an end token."""


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it. Raises ``UserError`` for values out of range.

    Exactly one of three things is asked: a continuation (``max_tokens`` not 0), an embedding, or the log-probabilities
    of the prompt alone (``prompt_logprobs`` with ``max_tokens`` 0).
    """

    prompt: abc.Sequence[int]
    """Token ids, at least one."""
    max_tokens: int | None = None
    """To generate at most; None: what the context leaves."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: abc.Sequence[str] = ()
    """Strings before which the text ends."""
    ignore_end: bool = False
    """Go on after an end token."""
    keep_special: bool = False
    """Special tokens appear in the text (for formats of tool calls that are made of them)."""
    constraint: Callable[[], Constraint] | None = None
    """Makes the constraint when the sequence begins."""
    logprobs: int | None = None
    """Log-probabilities of every token and of so many most likely ones; None: none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens; such a prompt is never taken from the cache."""
    embedding: Literal["mean", "last"] | None = None
    """The final hidden states, over all tokens or of the last, instead of a continuation."""
    deadline: float | None = None
    """In seconds of ``time.monotonic()``."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UserError("expected a prompt of at least one token, found none")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UserError(f"expected at least one token to generate, found {self.max_tokens}")
        if self.max_tokens == 0 and self.prompt_logprobs is None and self.embedding is None:
            raise UserError("expected at least one token to generate, found 0")


@dataclass(frozen=True)
class Event:
    """What one step did for a sequence. The last event of a sequence has ``finish``."""

    sequence: Sequence
    token: int | None = None
    """None: the sequence ended without another one; end tokens are never given."""
    text: str = ""
    """What became certain of its text: never half a character, never the beginning of a stop string."""
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None


@dataclass(eq=False)
class Sequence:
    """A request that was added to a scheduler, as it runs. Read it; only the scheduler changes it."""

    request: Request
    number: int
    """In order of arrival."""
    tokens: list[int] = field(default_factory=list)
    """Generated so far, without an end token."""
    finish: Finish | None = None
    error: str | None = None
    """One line, where ``finish`` is ``error``."""
    cached_tokens: int = 0
    """Of the prompt, found in the cache."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """One per token of the prompt; None for the first."""
    embedding: NDArray[np.float32] | None = None
    """``[hidden]``, not normalised."""
    added: float = 0.0
    """When it was added, in seconds of ``time.monotonic()``."""
    started: float | None = None
    """When its first token was computed."""
    first_token: float | None = None
    last_token: float | None = None
