"""Small random checkpoints of every family on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import write_tokenizer
from random_decoders import reference_model
from random_families import family_config


def write_family(folder: Path, family: str, seed: int, **changes: Any) -> Path:
    """With the byte tokenizer, float32, 64 tokens of context, and ``changes`` of the config."""
    folder.mkdir(parents=True)
    config = family_config(family, seed) | {"vocab_size": 257, "max_position_embeddings": 64} | changes
    if "original_max_position_embeddings" in config:
        config["original_max_position_embeddings"] = 64
    model = reference_model(config, seed)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    write_tokenizer(folder)
    return folder
