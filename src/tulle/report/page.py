"""Rendering: one template per kind of page, everything inline, written atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import tulle


def render(template: str, **context: Any) -> str:
    """The page of a template in ``report/templates``."""
    environment = Environment(
        loader=PackageLoader("tulle.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(footer=f"Made by Tulle {tulle.__version__}.", **context)


def write_page(file: Path, html: str) -> None:
    """Writes the page so that ``file`` is either absent, old or whole."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, file)


def chart(heading: str, note: str, svg: str, wide: bool = False) -> dict[str, Any]:
    """A picture's card."""
    return {"heading": heading, "note": note, "svg": svg, "wide": wide}


def tile(label: str, value: str, detail: str = "") -> dict[str, str]:
    """A headline number."""
    return {"label": label, "value": value, "detail": detail}
