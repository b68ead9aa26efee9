"""Text in, token sequences out: one reader for calibration and evaluation.

With a separator the text is cut into documents, each its own sequence, cut at the length; without one, everything is
one stream in non-overlapping windows of the length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulle.errors import UserError
from tulle.extras import needs
from tulle.network import require_hub

if TYPE_CHECKING:
    from torch import Tensor

FOLDER_SUFFIXES = (".txt", ".md", ".py", ".raw", ".jsonl")
TEXT_KEYS = ("text", "content")
CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer's average: how much text is tokenized to draw windows from, of a text that is longer."""


@dataclass(frozen=True)
class Text:
    """Documents and how they are used."""

    documents: tuple[str, ...]
    separate: bool
    """True: every document is its own sequence. False: they are joined with a blank line into one stream."""
    source: tuple[str, ...] = ()
    """Where they came from, for the report."""

    @classmethod
    def of(cls, documents: Sequence[str], source: str = "given documents") -> Text:
        return cls(tuple(documents), True, (source,))


def read_text(
    sources: Sequence[str | Path],
    separator: str | None = None,
    documents: tuple[int, int] | None = None,
    min_chars: int = 1,
) -> Text:
    """Reads text files, JSONL files (a ``text`` or ``content`` key per row), folders of these, or ``datasets`` names.

    ``separator`` cuts files into documents, which are stripped; those shorter than ``min_chars`` are dropped, then
    ``documents`` = (first, end) selects. Rows of a JSONL file or data set are documents by themselves. Raises
    ``UserError`` for a source that is missing, unreadable or empty.
    """
    found: list[str] = []
    separate = separator is not None
    for source in sources:
        rows, are_documents = _read(str(source))
        separate = separate or are_documents
        for row in rows:
            found += [piece.strip() for piece in row.split(separator)] if separator else [row]
    kept = [d for d in found if len(d) >= min_chars and d.strip()]
    if documents is not None:
        kept = kept[documents[0] : documents[1]]
    names = ", ".join(str(s) for s in sources)
    if not kept:
        raise UserError(
            f"expected text in {names or 'the calibration sources'}, found none; give a longer text or other documents"
        )
    return Text(tuple(kept), separate, tuple(Path(s).name if Path(s).exists() else str(s) for s in sources))


def sequences(
    text: Text,
    tokenizer: Any,
    length: int,
    samples: int | None = None,
    seed: int = 0,
    what: str = "calibration",
) -> list[Tensor]:
    """Token sequences, int64 ``[≤ length]`` each (``[length]`` in a stream, whose incomplete last window is dropped).

    ``samples``: that many of them; documents from the first on, windows of a stream drawn without repetition by
    ``seed``. Raises ``UserError`` when the text gives fewer.
    """
    import torch

    if text.separate:
        wanted = text.documents if samples is None else text.documents[:samples]
        found = [torch.tensor(ids[:length]) for ids in tokenizer(list(wanted))["input_ids"] if len(ids) > 1]
        unit = "documents"
    else:
        needed = None if samples is None else samples * length * CHARACTERS_PER_TOKEN
        ids = tokenizer("\n\n".join(_excerpt(text.documents, needed, seed)))["input_ids"]
        found = list(torch.tensor(ids).split(length))
        if found and len(found[-1]) < length:
            found.pop()
        unit = f"windows of {length} tokens"
        if samples is not None and len(found) > samples:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(found), generator=generator)[:samples].sort().values
            found = [found[int(i)] for i in chosen]
    if not found or (samples is not None and len(found) < samples):
        raise UserError(
            f"expected {samples or 1} {unit} of {what} text, found {len(found)}; "
            + (
                "give more text"
                if not found
                else f"give more text, or ask for {len(found)} with --samples or a shorter --length"
            )
        )
    return found


def _excerpt(documents: Sequence[str], characters: int | None, seed: int) -> list[str]:
    """Documents in a seeded order until there are enough characters; all, as they stand, when there are no more."""
    if characters is None or sum(map(len, documents)) <= characters:
        return list(documents)
    import torch

    generator = torch.Generator().manual_seed(seed)
    chosen: list[str] = []
    for i in torch.randperm(len(documents), generator=generator).tolist():
        document = documents[i]
        if len(document) > characters:
            start = int(torch.randint(len(document) - characters + 1, (1,), generator=generator))
            document = document[start : start + characters]
        chosen.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return chosen


def _read(source: str) -> tuple[list[str], bool]:
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in FOLDER_SUFFIXES and f.is_file())
        if not files:
            raise UserError(
                f"expected files ending in {', '.join(FOLDER_SUFFIXES)} in {path}, found none; check the folder"
            )
        read = [_read(str(f)) for f in files]
        return [row for rows, _ in read for row in rows], any(flag for _, flag in read)
    if path.is_file():
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"expected UTF-8 text in {path}, found it unreadable ({error}); convert it first") from None
        return (_json_rows(content, path), True) if path.suffix == ".jsonl" else ([content], False)
    if path.suffix or source.startswith((".", "/", "~")):
        raise UserError(
            f"expected a text file, JSONL file, folder or data set name, found nothing at {source}; check the path"
        )
    return _data_set(source), True


def _json_rows(content: str, path: Path) -> list[str]:
    rows = []
    # Only a line feed ends a row: str.splitlines also cuts at U+2028 or U+0085, which strings may hold.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"expected JSON in line {number} of {path}, found {error}; repair the line") from None
        key = next((k for k in TEXT_KEYS if isinstance(row, dict) and isinstance(row.get(k), str)), None)
        if key is None:
            raise UserError(
                f"expected a {' or '.join(TEXT_KEYS)} string in line {number} of {path}, found none; rename the key"
            )
        rows.append(row[key])
    return rows


def _data_set(name: str) -> list[str]:
    needs("data", f"the data set {name!r}", "give a file")
    import datasets

    require_hub(f"the data set {name!r}", "give a text file, a JSONL file or a folder instead")
    split = datasets.load_dataset(name, split="train", streaming=True)
    rows = []
    for row in split.take(10_000):
        key = next((k for k in TEXT_KEYS if isinstance(row.get(k), str)), None)
        if key is None:
            raise UserError(
                f"expected a {' or '.join(TEXT_KEYS)} column in {name}, found {', '.join(row)}; give a file instead"
            )
        rows.append(row[key])
    return rows
