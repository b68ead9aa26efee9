"""Finished cells of a result file are kept, so that a long run that was cut short goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cells:
    """The ``cells`` of a JSON file, and what else it says about the run."""

    def __init__(self, file: Path, **facts: Any):
        self.file = file
        self.content: dict[str, Any] = {"cells": {}}
        if file.exists():
            self.content = json.loads(file.read_text())
        self.content |= facts
        file.parent.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, key: str) -> Any:
        return self.content["cells"][key]

    def get(self, key: str) -> Any:
        """The cell, or None."""
        return self.content["cells"].get(key)

    def make(self, key: str, make: Callable[[], Any]) -> Any:
        """The cell, measured and written down unless it is there."""
        if key not in self.content["cells"]:
            self.content["cells"][key] = make()
            self.file.write_text(json.dumps(self.content, indent=2) + "\n")
        return self.content["cells"][key]
