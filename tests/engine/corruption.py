"""Damaged models: what the tests and the fuzz target share."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np

from tulle.engine import Engine
from tulle.engine.checkpoint import Checkpoint
from tulle.errors import UserError
from tulle.format.spec import InputSparsitySpec

HALF = InputSparsitySpec("top_k", keep=32, weighted=True)
BLOCKS4 = InputSparsitySpec("top_k", keep=32, unit=4)
SCHEMES = {
    "sparse": {
        "qkv": {"bits": 4, "group_size": 32, "sparse": True, "symmetric": False, "input_bits": 8},
        "o": {"bits": 8, "sparse": True, "pattern": "2:4"},
        "gate_up": {"sparse": True, "values_dtype": "bfloat16"},
        "down": {"bits": 5, "group_size": 64, "scale_bits": 8},
        "embedding": {"bits": 3, "group_size": 32, "scale_bits": 8},
        "head": {"bits": 6, "group_size": 16, "symmetric": False},
    },
    "input-major": {
        "qkv": {"bits": 4, "group_size": 32, "sparse": True, "symmetric": False, "input_sparsity": HALF},
        "o": {"bits": 2, "input_bits": 8, "input_sparsity": InputSparsitySpec("relu")},
        "gate_up": {"bits": 8, "input_sparsity": InputSparsitySpec("threshold", threshold=0.2)},
        "down": {"bits": 4, "group_size": 64, "sparse": True},
    },
    "dense input-major": {
        "qkv": {"bits": 4, "group_size": 64, "input_sparsity": BLOCKS4},
        "o": {"bits": 4, "sparse": True, "group_size": 32, "input_sparsity": BLOCKS4},
        "gate_up": {"bits": 2, "input_bits": 8, "input_sparsity": BLOCKS4},
        "down": {"bits": 8, "input_sparsity": InputSparsitySpec("top_k", keep=48, unit=4, by="norm")},
    },
}
"""Of a small model, by the layout that it is read in."""


def try_model(folder: Path, layout: str = "sparse") -> str:
    """ "ran" or the one-line message; anything but a ``UserError`` is raised on."""
    try:
        engine = Engine(folder, threads=2, layout=layout)
        logits = engine.forward([1, 2, 3])
        engine.forward([4], 0, 3)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    assert logits.shape == (3, engine.vocabulary) and logits.dtype == np.float32
    return "ran"


def by_size_and_mtime(checkpoint: Checkpoint) -> str:
    """In place of ``Checkpoint.identity``: a copy of a folder is the same model, so that damage of the engine's own
    file in a copy is read, not mended."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.source.files]
    return json.dumps([checkpoint.config, stats], sort_keys=True)


def damaged(source: Path, target: Path, choice: random.Random) -> str:
    """Copies a model folder with one file changed at random, and says how."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    files = [f for f in sorted(target.rglob("*")) if f.suffix in (".safetensors", ".json") and f.name != "layouts.json"]
    file = choice.choice(files)
    data = bytearray(file.read_bytes())
    kind = choice.choice(("flip", "flip", "digit", "cut", "swap", "zero"))
    at = choice.randrange(len(data))
    if kind == "flip":
        # Headers are where most of what can be believed stands.
        at = choice.randrange(min(len(data), 6000)) if choice.random() < 0.7 else at
        data[at] ^= 1 << choice.randrange(8)
    elif kind == "digit":
        digits = [i for i, b in enumerate(data[:20000]) if 48 <= b <= 57] or [at]
        at = choice.choice(digits)
        data[at] = 48 + choice.randrange(10)
    elif kind == "cut":
        del data[at:]
    elif kind == "swap":
        other = choice.randrange(len(data))
        data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    else:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    file.write_bytes(data)
    return f"{kind} at {at} of {file.name}"
