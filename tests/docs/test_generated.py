"""docs/reference says what the code says: python docs/generate.py."""

from __future__ import annotations

import importlib.util

import docs_pages as markdown
import pytest

_spec = importlib.util.spec_from_file_location("generate", markdown.ROOT / "docs" / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)
PAGES = [page for page in markdown.pages() if "<!-- generated:" in page.read_text("utf-8")]


def test_there_are_such_pages() -> None:
    assert {page.name for page in PAGES} == {"recipes.md", "training-recipes.md", "command-line.md"}


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_up_to_date(page) -> None:
    text = page.read_text("utf-8")
    assert generate.generated(text) == text, f"run: python docs/generate.py ({page.name} is stale)"
