"""What single tokens stand for, for log-probabilities: a token may be a part of a character."""

from __future__ import annotations

import re

from tulle.text.detokenizer import BYTE_OF
from tulle.text.sentencepiece import SPACE
from tulle.text.tokenizer import ModelTokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and text of the tokens of a vocabulary."""

    def __init__(self, tokenizer: ModelTokenizer):
        library = tokenizer.tokenizer
        decoder = library.decoder
        spec = "" if decoder is None else decoder.__getstate__().decode()
        self._byte_level = '"ByteLevel"' in spec
        self._added = {number: token.content for number, token in library.get_added_tokens_decoder().items()}
        self._library = library
        self._known: dict[int, tuple[str, bytes]] = {}

    def both(self, token: int) -> tuple[str, bytes]:
        """The text of a token and its bytes; text that is no UTF-8 is ``bytes:\\xe6\\x95``, as OpenAI writes it."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._both(token)
        return found

    def text(self, token: int) -> str:
        """The text of a token."""
        return self.both(token)[0]

    def _both(self, token: int) -> tuple[str, bytes]:
        raw = self._bytes(token)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._library.id_to_token(token)
        if text is None:  # rows of the head beyond the vocabulary
            return b""
        if self._byte_level:
            try:
                return bytes([BYTE_OF[character] for character in text])
            except KeyError:
                return str(text).encode()
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else str(text).replace(SPACE, " ").encode()
