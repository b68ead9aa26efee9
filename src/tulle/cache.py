"""Where what is made of models is kept, so that it is made once."""

import os
from pathlib import Path

FOLDER = ".engine"
"""Beside a model."""


def user_folder() -> Path:
    """For what belongs to no folder, or to one that cannot be written to: ``XDG_CACHE_HOME`` decides."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tulle"
