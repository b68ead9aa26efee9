"""SentencePiece's table of characters (``precompiled_charsmap``), checked before the tokenizers library walks it.

Layout: the trie's size in bytes (u32), the trie (u32 units, little-endian), then the replacements, UTF-8 texts that end
with a zero byte. The trie is a double array of the library Darts-clone: from state s, byte c leads to unit s ⊕ c, which
is the right one where its label is c; the next state is that unit's place ⊕ its offset, and holds a value (where a
replacement begins) if the unit has a leaf.

The library takes every place on trust: one beyond the end is a panic in the middle of a text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LABEL = (1 << 31) | 0xFF
VALUE = (1 << 31) - 1
STATES = 4096
"""That are followed at once."""


def check_charsmap(data: bytes) -> None:
    """Raises ``ValueError`` for a table that no text may be looked up in."""
    if len(data) < 4:
        raise ValueError("a table of characters without a size")
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 4 <= size <= len(data) - 4:
        raise ValueError(f"a table of characters of {size} bytes in {len(data)}")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    replacements = data[4 + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("replacements of characters that are no UTF-8") from None
    labels, offsets = units & LABEL, (units >> 10) << ((units & (1 << 9)) >> 6)
    seen = np.zeros(len(units), bool)
    waiting = offsets[:1]
    while len(waiting):
        states, waiting = waiting[:STATES], waiting[STATES:]
        # Every byte may come: its unit has to be there, whatever it says.
        if int((states | 0xFF).max()) >= len(units):
            raise ValueError("a table of characters that leads beyond its end")
        states = np.unique(states[~seen[states]])
        seen[states] = True
        found = _following(states, labels, offsets)
        leaves = found[(units[found] >> 8) & 1 == 1]
        ends = leaves ^ offsets[leaves]
        if len(ends) and int(ends.max()) >= len(units):
            raise ValueError("a table of characters that leads beyond its end")
        _check_values(units[ends] & VALUE, replacements)
        waiting = np.concatenate([waiting, found ^ offsets[found]])


def _following(states: NDArray[np.int64], labels: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Units that some byte leads to from one of the states."""
    bytes_ = np.arange(1, 256, dtype=np.int64)
    places = states[:, None] ^ bytes_
    return places[labels[places] == bytes_]


def _check_values(values: NDArray[np.int64], replacements: bytes) -> None:
    """Every value is where a character begins, or the end."""
    if not len(values):
        return
    if int(values.max()) > len(replacements):
        raise ValueError("a replacement of characters beyond the end")
    text = np.frombuffer(replacements + b"\0", np.uint8)
    if ((text[values] & 0xC0) == 0x80).any():
        raise ValueError("a replacement of characters that begins within one")
