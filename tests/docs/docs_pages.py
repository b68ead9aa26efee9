"""The documentation's Markdown as the tests of this folder read it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """README, CONTRIBUTING, benchmarks/README and every page of docs."""
    top = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    return top + sorted((ROOT / "docs").rglob("*.md"))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced code blocks."""
    return FENCE.findall(text)


def prose(text: str) -> str:
    """The page without fenced code and without comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)


def anchor(heading: str) -> str:
    """The anchor that GitHub and mkdocs (by the slug function of mkdocs.yml) give a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    text = unicodedata.normalize("NFC", text).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(found[1]) for found in re.finditer(r"^#+ (.*)$", prose(page.read_text("utf-8")), re.MULTILINE)}


def exercise(page: Path, title: str) -> str:
    """The code block behind ``<!-- exercise: TITLE -->``."""
    _, found, rest = page.read_text("utf-8").partition(f"<!-- exercise: {title} -->")
    assert found, f"{name(page)} has no exercise {title!r}"
    return blocks(rest)[0][1]


def shell_lines(text: str) -> Iterator[str]:
    """Command lines of code blocks without a language or with a shell's, continuation lines joined."""
    for language, content in blocks(text):
        if language in ("", "sh", "bash"):
            for line in content.replace("\\\n", " ").splitlines():
                yield re.sub(r"\s+#\s.*$", "", line).strip()
