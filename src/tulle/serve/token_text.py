"""What single tokens stand for, for log-probabilities: a token may be a part of a character."""

from __future__ import annotations

from tulle.text.detokenizer import token_bytes
from tulle.text.tokenizer import ModelTokenizer


class TokenTexts:
    """Bytes and text of the tokens of a vocabulary, as they are in the middle of a text."""

    def __init__(self, tokenizer: ModelTokenizer):
        self._bytes = token_bytes(tokenizer.tokenizer)
        self._known: dict[int, tuple[str, bytes]] = {}

    def both(self, token: int) -> tuple[str, bytes]:
        """The text of a token and its bytes; text that is no UTF-8 is ``bytes:\\xe6\\x95``, as OpenAI writes it."""
        found = self._known.get(token)
        if found is None:
            # Logits may have rows beyond the vocabulary.
            raw = self._bytes[token] if token < len(self._bytes) else b""
            try:
                found = raw.decode(), raw
            except UnicodeDecodeError:
                found = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw
            self._known[token] = found
        return found

    def text(self, token: int) -> str:
        """The text of a token."""
        return self.both(token)[0]
