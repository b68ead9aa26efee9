"""The documents that a recipe's sources name, held out or to train on.

Python source comes from :mod:`tulle.text.standard_library`. Files and data sets become an index of documents: what
stays in memory is where each one lies, not its text. A text file is cut at ``separator``, or without one into pieces of
about ``PIECE`` bytes at line ends; a row of a JSONL file is a document. A data set of the hub is streamed once into a
JSONL file, and read from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tulle.errors import UserError
from tulle.extras import needs
from tulle.network import require_hub
from tulle.text import standard_library
from tulle.text.standard_library import STDLIB, Document, order_key
from tulle.training.recipe import Source, TextData

TEXT_SUFFIXES = (".txt", ".md", ".py", ".raw")
TEXT_KEYS = ("text", "content")
PIECE = 1 << 20


class Readable(Protocol):
    """A document, wherever its text lies."""

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


def held_out_texts(data: TextData, cache: Path) -> list[str]:
    """The evaluation text that ``data`` names; ``cache`` is a folder for what must be fetched.

    Raises ``UserError`` for text that is missing or unreadable.
    """
    if not data.held_out:
        return standard_library.held_out_text()
    found: list[str] = []
    for source in data.held_out:
        if source.name is None:
            found += [document.text for document in index(source, cache)]
        elif source.name == STDLIB:
            found += standard_library.held_out_text()
        else:
            found += [document.text for document in _python_source([source.name])[1]]
    return found


def training_documents(data: TextData, seed: int, cache: Path, held_out: Sequence[str]) -> list[Readable]:
    """The documents of one epoch in seeded order, none of them ``held_out``; ``cache`` as above.

    Raises ``UserError`` for text that is missing or unreadable.
    """
    train, _ = _python_source([source.name for source in data.sources if source.name is not None])
    evaluated = set(held_out)
    digests = {hashlib.sha256(text.encode()).digest() for text in evaluated}
    chosen: list[tuple[bytes, Readable]] = []
    for source in data.sources:
        if source.name is not None:
            own = [d for d in train if d.name.startswith(f"{source.name}:") and d.text not in evaluated]
            chosen += weighted(own, source.weight, seed)
        else:
            files = [d for d in index(source, cache) if d.digest not in digests]
            chosen += weighted(files, source.weight, seed)
    return [document for _, document in sorted(chosen, key=lambda item: item[0])]


def _python_source(names: Sequence[str]) -> tuple[list[Document], list[Document]]:
    """(train, held out) of distributions, split together so that copies of a file fall on one side."""
    return standard_library.split(document for name in names for document in standard_library.read_source(name))


def weighted(documents: Sequence[Readable], weight: float, seed: int) -> list[tuple[bytes, Readable]]:
    """Each document ``floor(weight)`` times, and a seeded fraction of them once more; with the key that orders them."""
    whole, part = divmod(weight, 1)
    chosen = []
    for document in documents:
        lot = int.from_bytes(order_key(f"lot:{document.name}", seed)[:8], "big")
        for copy in range(int(whole) + (lot < part * 2**64)):
            chosen.append((order_key(f"{copy}:{document.name}", seed), document))
    return chosen


@dataclass(frozen=True)
class Indexed:
    """A document in a file: ``size`` bytes from ``offset`` on; a JSONL row is made a text by ``template``."""

    name: str
    file: Path
    offset: int
    size: int
    template: str | None
    digest: bytes
    """SHA-256 of the text."""

    @property
    def text(self) -> str:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return _text(file.read(self.size), self.file, self.template)


def index(source: Source, cache: Path) -> list[Indexed]:
    """The documents of a ``path`` or ``dataset`` source, in order; ``cache`` is a folder for what is fetched.

    Raises ``UserError`` for what is missing, unreadable or empty.
    """
    root = Path(source.path) if source.path is not None else _fetched(source, cache)
    found: list[Indexed] = []
    for file in _files(root):
        # Not the whole path: the order of documents must not depend on where a folder lies.
        label = file.name if file == root else f"{root.name}/{file.relative_to(root).as_posix()}"
        for number, (offset, raw) in enumerate(_pieces(file, source.separator)):
            text = _text(raw, file, source.template)
            if text.strip():
                digest = hashlib.sha256(text.encode()).digest()
                found.append(Indexed(f"{label}:{number}", file, offset, len(raw), source.template, digest))
            if source.documents is not None and len(found) == source.documents:
                return found
    if not found:
        raise UserError(f"expected text in {source.label}, found none; check the path")
    return found


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"expected a text file, JSONL file or folder, found nothing at {root}; check the path")
    found = sorted(f for f in root.rglob("*") if f.suffix in (*TEXT_SUFFIXES, ".jsonl") and f.is_file())
    if not found:
        raise UserError(
            f"expected files ending in {', '.join((*TEXT_SUFFIXES, '.jsonl'))} in {root}, found none; check the folder"
        )
    return found


def _pieces(file: Path, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each document, read in blocks."""
    if file.suffix == ".jsonl":
        yield from _cut(file, b"\n")
    elif separator is not None:
        yield from _cut(file, separator.encode())
    else:
        offset, lines, size = 0, [], 0
        with file.open("rb") as handle:
            for line in handle:
                lines.append(line)
                size += len(line)
                if size >= PIECE:
                    yield offset, b"".join(lines)
                    offset, lines, size = offset + size, [], 0
        if lines:
            yield offset, b"".join(lines)


def _cut(file: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    offset, rest = 0, b""
    with file.open("rb") as handle:
        while block := handle.read(PIECE):
            *whole, rest = (rest + block).split(separator)
            for piece in whole:
                yield offset, piece
                offset += len(piece) + len(separator)
    if rest:
        yield offset, rest


def _text(raw: bytes, file: Path, template: str | None) -> str:
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")  # a mark of UTF-8 at the beginning of a file
    except UnicodeDecodeError as error:
        raise UserError(f"expected UTF-8 text in {file}, found it unreadable ({error}); convert it first") from None
    if file.suffix != ".jsonl" or not text.strip():
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in every line of {file}, found {error}; repair the line") from None
    return row_text(row, template, file.name)


def row_text(row: Any, template: str | None, where: str) -> str:
    """A row as text: by its template, or its ``text`` or ``content``."""
    if not isinstance(row, dict):
        raise UserError(f"expected an object in every row of {where}, found {type(row).__name__}; repair the row")
    if template is not None:
        try:
            return template.format_map(row)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"expected the template's keys in {where}, found {', '.join(row)} ({error!r}); correct the template"
            ) from None
    key = next((k for k in TEXT_KEYS if isinstance(row.get(k), str)), None)
    if key is None:
        raise UserError(
            f"expected {' or '.join(TEXT_KEYS)} in every row of {where}, found {', '.join(row)}; give a template"
        )
    text: str = row[key]
    return text


def _fetched(source: Source, cache: Path) -> Path:
    """The rows of a data set of the hub in a JSONL file, fetched unless it is there."""
    facts = [source.dataset, source.config, source.split, source.documents, source.template]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    file = cache / f"dataset-{key}.jsonl"
    if file.is_file():
        return file
    needs("data", f"the data set {source.dataset!r}", "name a file or a folder by path:")
    import datasets

    require_hub(f"the data set {source.dataset!r}", "name a file or a folder by path: instead")
    partial = file.with_suffix(".partial")
    try:
        rows: Iterable[Any] = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        with partial.open("w", encoding="utf-8") as out:
            for number, row in enumerate(rows):
                if number == source.documents:
                    break
                out.write(json.dumps(row, default=str) + "\n")
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).splitlines() or ["nothing"])[0]
        raise UserError(f"expected the data set {source.dataset!r} on the hub, found: {line}; check the name") from None
    os.replace(partial, file)
    return file
