"""The engine under every instruction set of this machine, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tulle.native import supported_isas


def logits_by_isa(model: Path, scratch: Path, logits: str, **options: object) -> list[np.ndarray]:
    """What ``logits``, an expression of ``engine``, is under each set, scalar first."""
    code = (
        "import sys, numpy as np; from tulle.engine import Engine\n"
        f"engine = Engine(sys.argv[1], 1, cache='f32', head='as stored', **{options!r})\n"
        f"np.save(sys.argv[2], {logits})"
    )
    found = []
    for isa in supported_isas():
        file = scratch / f"{isa}.npy"
        environment = os.environ | {"TULLE_ISA": isa}
        subprocess.run([sys.executable, "-c", code, str(model), str(file)], check=True, env=environment)
        found.append(np.load(file))
    return found
