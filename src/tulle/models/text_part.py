"""The text part of a checkpoint that also sees or hears: its decoder, under the names of a text model.

Such a checkpoint has the text model's config in ``text_config``, and its tensors behind a prefix. All else (vision
tower, projector, heads for several tokens) is left out, which a note says.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tulle.models.description import families
from tulle.models.renamed import HEAD, PREFIX, Renamed

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

PREFIXES = ("language_model.model.", "model.language_model.")
"""Of the decoder's tensors: as checkpoints are stored, and as transformers names them."""
HEADS = (f"language_model.{HEAD}", HEAD)
OUTER = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "transformers_version")
"""Keys of the whole model's config that hold for its text part too."""


def text_part(source: TensorSource) -> Renamed:
    """The text part, with a text model's config and names."""
    stored = {_name(name): name for name in source.names() if _name(name)}
    left = Counter(_part(name) for name in source.names() if not _name(name))
    parts = ", ".join(f"{count} tensors of {part}" for part, count in sorted(left.items()))
    found = Renamed(source, stored)
    # Of a switch that both have, transformers reads the outer one.
    outer = {key: source.config[key] for key in OUTER if key in source.config}
    found.config = {**source.config["text_config"], **outer}
    whole = source.config.get("model_type")
    found.notes = [*source.notes, f"{whole}: the text part is read; left out: {parts or 'nothing'}"]
    return found


def has_text_part(source: TensorSource) -> bool:
    inner = source.config.get("text_config")
    if not isinstance(inner, dict) or source.config.get("model_type") in families():
        return False
    return inner.get("model_type") in families() and any(name.startswith(PREFIXES) for name in source.names())


def _part(stored: str) -> str:
    """What a tensor that is left out belongs to: ``vision_tower``, ``model.visual``, ``mtp`` …"""
    first, _, rest = stored.partition(".")
    return f"model.{rest.partition('.')[0]}" if first == "model" else first


def _name(stored: str) -> str:
    """In a text model; empty for what is not of its decoder."""
    if stored in HEADS:
        return HEAD
    for prefix in PREFIXES:
        if stored.startswith(prefix):
            return PREFIX + stored.removeprefix(prefix)
    return ""
