"""docs/reference says what the code says: python docs/generate.py."""

from __future__ import annotations

import importlib.util
import re

import docs_pages as markdown
import pytest

_spec = importlib.util.spec_from_file_location("generate", markdown.ROOT / "docs" / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)
PAGES = [page for page in markdown.pages() if "<!-- generated:" in page.read_text("utf-8")]


def test_there_are_such_pages() -> None:
    assert {page.name for page in PAGES} == {"recipes.md", "training-recipes.md", "command-line.md", "families.md"}


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_up_to_date(page) -> None:
    text = page.read_text("utf-8")
    assert generate.generated(text) == text, f"run: python docs/generate.py ({page.name} is stale)"


def cells(page):
    """(heading, key, meaning) of every table of settings."""
    heading = ""
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        found = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("| `") else []
        if len(found) == 4:
            yield heading, found[0], found[3]


@pytest.mark.parametrize("name", ["recipes.md", "training-recipes.md"])
def test_every_setting_says_what_it_means(name) -> None:
    (page,) = [page for page in PAGES if page.name == name]
    found = list(cells(page))
    assert len(found) > 40
    assert [(heading, key) for heading, key, meaning in found if len(meaning) < 8] == []
