"""Tulle makes Transformer language models sparse and low-bit, and runs them.

`import tulle` alone imports neither torch nor transformers; the names below are looked up at first use.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

__all__ = ["Engine", "__version__", "compress", "load"]

__version__ = metadata.version("tulle")


def __getattr__(name: str) -> Any:
    if name in ("compress", "load"):
        importlib.import_module("tulle.extras").needs("compress", f"tulle.{name}")
    if name == "compress":
        return importlib.import_module("tulle.training.compress").compress
    if name == "load":
        return importlib.import_module("tulle.hf").load
    if name == "Engine":
        return importlib.import_module("tulle.engine").Engine
    raise AttributeError(f"module 'tulle' has no attribute {name!r}")
