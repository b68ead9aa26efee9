"""What the base install leaves out: which extra brings which library, and the one line that says so."""

from __future__ import annotations

import importlib.util

from tulle.errors import UserError

EXTRAS = {
    "compress": ("torch", "transformers", "scipy", "matplotlib"),
    "train": ("torch", "transformers", "scipy", "matplotlib", "accelerate"),
    "export": ("torch", "transformers", "compressed_tensors"),
    "data": ("datasets",),
    "tasks": ("torch", "transformers", "lm_eval"),
}
"""The libraries that an extra of pyproject.toml stands for, by the names they are imported with."""


def needs(extra: str, what: str, instead: str | None = None) -> None:
    """Raises ``UserError`` unless the libraries of an extra are installed. Imports none of them.

    ``what`` names the thing that needs them, such as ``tulle compress``; ``instead`` what to try without them.
    """
    missing = [name for name in EXTRAS[extra] if not _installed(name)]
    if missing:
        otherwise = "" if instead is None else f", or {instead}"
        raise UserError(
            f"expected {_listed(missing)} for {what}, found none installed; "
            f"try: pip install 'tulle[{extra}]'{otherwise}"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module that somebody put into sys.modules by hand
        return False


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
