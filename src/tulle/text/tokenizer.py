"""A model's tokenizer with what belongs to it: special tokens, ends of text, chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from tulle.errors import UserError
from tulle.text import chat_template
from tulle.text.detokenizer import Detokenizer, decode, overlap, special_ids


@dataclass
class ModelTokenizer:
    """Text to tokens and back, for one model. From a folder: :func:`tulle.text.tokenizer_folder.read_tokenizer`.

    Truncation and padding that were saved with the tokenizer are switched off: a prompt is never cut in silence.
    """

    tokenizer: Tokenizer
    """Of the ``tokenizers`` library. Its added tokens with ``special`` set do not appear in text."""
    special: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by their names: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token`` ...; what chat
    templates can name."""
    end_tokens: frozenset[int] = frozenset()
    """Ids that end a text when the model gives one of them."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates in Jinja by name; ``default`` is the usual one."""
    clean_up: bool = False
    """Remove spaces before punctuation when decoding (``clean_up_tokenization_spaces`` of transformers)."""

    def __post_init__(self) -> None:
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; ``special``: with what the tokenizer puts around a text, such as BOS.

        Raises ``UserError`` for text that cannot be written in UTF-8.
        """
        try:
            found: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError):
            raise not_utf8(text) from None
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"expected a tokenizer.json that encodes any text, found one that fails ({error}); save it again"
            ) from None
        return found

    def decode(self, tokens: Sequence[int], keep_special: bool = False) -> str:
        """The text of all tokens, without special ones unless ``keep_special``."""
        return decode(self.tokenizer, tokens, keep_special=keep_special, clean_up=self.clean_up)

    def special_id(self, name: str) -> int | None:
        """The id of a special token, such as ``bos_token``; None where the model has none."""
        token = self.special.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; encode it with ``special=False``.

        ``template``: a template's name, for models with several; ``variables``: what else the template asks for, such
        as ``enable_thinking``. Raises ``UserError`` where the model has no chat template, or one that fails.
        """
        return chat_template.render(
            chat_template.chosen_template(self.templates, template, tools),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special, **variables},
        )

    def stream(self, prompt: Sequence[int] = (), stop: Sequence[str] = (), keep_special: bool = False) -> TextStream:
        """The text that follows ``prompt``, up to the first of the ``stop`` strings.

        ``keep_special``: special tokens are part of the text.
        """
        return TextStream(self, prompt, stop, keep_special)


class TextStream:
    """Tokens in, text out, as soon as it is certain: never half a character, never the beginning of a stop string.

    A stop string may be a special token, or hold one, even where special tokens are not part of the text.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        keep_special: bool = False,
    ):
        library = tokenizer.tokenizer
        self._detokenizer = Detokenizer(library, prompt, keep_special=keep_special, clean_up=tokenizer.clean_up)
        self._stop = [s for s in stop if s]
        unseen = special_ids(library) if self._stop and not keep_special else ()
        contents = {i: str(library.id_to_token(i)) for i in unseen}
        self._hidden = {i: content for i, content in contents.items() if any(content in s for s in self._stop)}
        self._held = ""
        self._unseen: list[tuple[int, int]] = []
        """Where in ``_held`` special tokens stand: (start, end)."""
        self.stopped = False

    def add(self, token: int) -> str:
        """What this token adds to the text; sets ``stopped`` where a stop string is complete."""
        if token in self._hidden:
            start = len(self._held)
            self._held += self._hidden[token]
            self._unseen.append((start, len(self._held)))
        else:
            self._held += self._detokenizer.add(token)
        return self._release()

    def finish(self) -> str:
        """What was held back; up to a stop string that only now is complete."""
        if self.stopped:
            return ""
        self._held += self._detokenizer.finish()
        released = self._release()
        return released if self.stopped else released + self._give(len(self._held))

    def _release(self) -> str:
        places = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            released = self._give(min(places))
            self._held, self._unseen = "", []
            return released
        keep = max((overlap(self._held, s) for s in self._stop), default=0)
        return self._give(len(self._held) - keep)

    def _give(self, end: int) -> str:
        """The text before ``end``, which is held no longer, without special tokens."""
        given, start = "", 0
        for first, last in self._unseen:
            given += self._held[start : min(first, end)]
            start = min(last, end)
        given += self._held[start:end]
        self._unseen = [(max(a - end, 0), b - end) for a, b in self._unseen if b > end]
        self._held = self._held[end:]
        return given


def not_utf8(text: str | bytes) -> UserError:
    """The error for a prompt whose bytes are no UTF-8."""
    shown = text.encode("utf-8", "surrogateescape") if isinstance(text, str) and _only_escapes(text) else text
    return UserError(f"expected text in UTF-8, found {shown[:60]!r}; convert it first, such as with iconv -t utf-8")


def _only_escapes(text: str) -> bool:
    """Whether the surrogates in a text stand for bytes, as those of arguments do."""
    return not any(0xD800 <= ord(c) < 0xDC80 or 0xDCFF < ord(c) <= 0xDFFF for c in text)
