"""Rendering: one template per kind of page, everything inline, written atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import tulle


def render(template: str, **context: Any) -> str:
    """The page of a template in ``report/templates``."""
    return _environment().get_template(template).render(footer=f"Made by Tulle {tulle.__version__}.", **context)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table's HTML, for a card; the first ``text_columns`` are aligned to the left. Cells are escaped."""
    return str(_environment().get_template("parts.html").module.table(columns, rows, text_columns))  # type: ignore[attr-defined]


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tulle.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(file: Path, html: str) -> None:
    """Writes the page so that ``file`` is either absent, old or whole."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, file)


def chart(
    heading: str, note: str, svg: str, wide: bool = False, text: str | None = None, below: str = ""
) -> dict[str, Any]:
    """A picture's card. ``text`` is read out for the picture; None: the heading, "": the content has texts of its own.
    ``below`` is HTML that follows it, such as a table of its figures."""
    alternative = heading if text is None else text
    return {"heading": heading, "note": note, "svg": svg, "wide": wide, "text": alternative, "below": below}


def panels(parts: Sequence[tuple[str, str, str]], columns: int) -> str:
    """Small pictures side by side (one below the other on a narrow screen), as (title, facts, SVG)."""
    return str(_environment().get_template("parts.html").module.panels(parts, columns))  # type: ignore[attr-defined]


def folded(summary: str, content: str) -> str:
    """HTML behind a line that opens it."""
    return str(_environment().get_template("parts.html").module.folded(summary, content))  # type: ignore[attr-defined]


def tile(label: str, value: str, detail: str = "") -> dict[str, str]:
    """A headline number."""
    return {"label": label, "value": value, "detail": detail}
