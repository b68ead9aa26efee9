"""Tokens to text and back, without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tulle.engine.files import json_object
from tulle.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"expected a tokenizer.json in {folder}, found none that can be read ({error}); save it with "
                "transformers' save_pretrained"
            ) from None
        self.settings = json_object(folder / "tokenizer_config.json")
        generation, config = json_object(folder / "generation_config.json"), json_object(folder / "config.json")
        stop = generation.get("eos_token_id", config.get("eos_token_id"))
        ends = {stop} if isinstance(stop, int) else set(stop or ())
        named = self._special("eos_token")
        if named is not None:
            ends.add(self.tokenizer.token_to_id(named))
        self.end_tokens = frozenset(t for t in ends if isinstance(t, int))
        template = self.settings.get("chat_template")
        file = folder / "chat_template.jinja"
        self.chat_template: str | None = file.read_text(encoding="utf-8") if file.exists() else template

    def _special(self, key: str) -> str | None:
        value = self.settings.get(key)
        return value.get("content") if isinstance(value, dict) else value

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; ``special``: with what the tokenizer puts around a text, such as BOS."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt for a conversation. Raises ``UserError`` where the model has no chat template."""
        if not self.chat_template:
            raise UserError(
                "expected a model with a chat template, found none in tokenizer_config.json; use tulle generate"
            )
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        names = {key: self._special(key) or "" for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=True, **names)
        except TemplateError as error:
            raise UserError(f"expected a chat template that can be filled in, found: {error}") from None


class Stream:
    """Tokens in, text out, as soon as it is certain: never half a character, never the beginning of a stop string."""

    def __init__(self, text: Text, stop: Sequence[str] = ()):
        self._text, self._stop = text, [s for s in stop if s]
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded again
        self._given = 0  # characters of those that have been taken over
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What this token adds to the text; sets ``stopped`` where a stop string is complete."""
        self._tokens.append(token)
        whole = self._text.decode(self._tokens[self._start :])
        if whole.endswith(REPLACEMENT):
            return ""
        self._held += whole[self._given :]
        # Decoding needs some context before a token, and not all of it.
        if len(self._tokens) - self._start > 32:
            self._start = len(self._tokens) - 8
            whole = self._text.decode(self._tokens[self._start :])
        self._given = len(whole)
        return self._release()

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        rest, self._held = self._held + self._text.decode(self._tokens[self._start :])[self._given :], ""
        return rest

    def _release(self) -> str:
        places = [(self._held.find(s), s) for s in self._stop if s in self._held]
        if places:
            at, _ = min(places)
            self.stopped = True
            released, self._held = self._held[:at], ""
            return released
        keep = max((overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    lengths: Iterable[int] = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
