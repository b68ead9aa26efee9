"""Prose that a newcomer can skim: short lines, few figures per sentence, the field's own words."""

from __future__ import annotations

import re
from pathlib import Path

import docs_pages as markdown
import pytest

PAGES = markdown.pages()
WIDTH = 100
FIGURES = 4
"""More in one sentence belong into a table."""
FIGURE = re.compile(r"(?<![\w.–-])[−+±]?\d[\d.,:·⁻⁰-⁹–]*(?![\d]*-?bits?\b)(?!-)")
DIALECT = {
    r"filled up": "densified",
    r"by fours": "in blocks of 4",
    r"by columns": "input-major",
    r"\bheed": "respect",
    r"\broad\b": "pipeline",
    r"\bstrips?\b": "panel",
    r"\bturned into\b(?! a table)": "rotated",
    r"rows? of the anatomy": "linear group",
    r"\brecorded\b": "as quantised",
}
"""Words of the project's old dialect, and the field's (the table of standard terms)."""


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items, without tables, headings, code and links' addresses."""
    text = re.sub(r"\]\([^)]*\)", "]", markdown.prose(text))
    text = re.sub(r"^(\||#| {4}|!\[|\[[^]]+\]:).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "`", text)
    found = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [" ".join(part.split()) for part in found if part.strip()]


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.;:!?])\s+", re.sub(r"^(?:[-*]|\d+\.) ", "", paragraph))


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_lines_are_short(page: Path) -> None:
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    lines = [line for line in markdown.prose(text).splitlines() if not line.startswith(("|", "#", "[", "!["))]
    assert not [line for line in lines if len(line) > WIDTH]


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_no_sentence_with_many_figures(page: Path) -> None:
    every = [s for paragraph in paragraphs(page.read_text("utf-8")) for s in sentences(paragraph)]
    assert not [sentence for sentence in every if len(FIGURE.findall(sentence)) > FIGURES]


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_standard_terms(page: Path) -> None:
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", markdown.prose(text))
    for word, better in DIALECT.items():
        found = re.search(word, text, re.IGNORECASE)
        assert not found, f"{found[0]!r}: write {better!r}"


def test_readme_is_short() -> None:
    assert len((markdown.ROOT / "README.md").read_text("utf-8").splitlines()) <= 90
