"""The text part of a checkpoint that also sees or hears: its decoder, under the names of a text model.

Such a checkpoint has the text model's config in ``text_config``, and its tensors behind a prefix. All else (vision
tower, projector, heads for several tokens) is left out, which a note says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tulle.models.description import families
from tulle.models.tensor_file import TensorInfo

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

PREFIXES = ("language_model.model.", "model.language_model.")
"""Of the decoder's tensors: as checkpoints are stored, and as transformers names them."""
HEADS = ("language_model.lm_head.weight", "lm_head.weight")
OUTER = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "transformers_version")
"""Keys of the whole model's config that hold for its text part too."""


class TextPart:
    """A source with the text part's tensors and config."""

    plain = False

    def __init__(self, base: TensorSource):
        self._base, self.path, self.tokenizer = base, base.path, base.tokenizer
        self.files: Sequence[Path] = base.files
        outer = {key: base.config[key] for key in OUTER if key in base.config}
        # Of a switch that both have, transformers reads the outer one.
        self.config: dict[str, Any] = {**base.config["text_config"], **outer}
        self._stored = {_name(name): name for name in base.names() if _name(name)}
        left = Counter(_part(name) for name in base.names() if not _name(name))
        parts = ", ".join(f"{count} tensors of {part}" for part, count in sorted(left.items()))
        whole = base.config.get("model_type")
        self.notes = [*base.notes, f"{whole}: the text part is read; left out: {parts or 'nothing'}"]

    def names(self) -> list[str]:
        return sorted(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def info(self, name: str) -> TensorInfo:
        return self._base.info(self._stored[name])

    def read(self, name: str) -> NDArray[Any]:
        return self._base.read(self._stored[name])

    def identity(self) -> str:
        return self._base.identity()


def has_text_part(source: TensorSource) -> bool:
    inner = source.config.get("text_config")
    return (
        source.config.get("model_type") not in families()
        and isinstance(inner, dict)
        and (inner.get("model_type") in families() and any(name.startswith(PREFIXES) for name in source.names()))
    )


def _part(stored: str) -> str:
    """What a tensor that is left out belongs to: ``vision_tower``, ``model.visual``, ``mtp`` …"""
    first, _, rest = stored.partition(".")
    return f"model.{rest.partition('.')[0]}" if first == "model" else first


def _name(stored: str) -> str:
    """In a text model; empty for what is not of its decoder."""
    if stored in HEADS:
        return "lm_head.weight"
    for prefix in PREFIXES:
        if stored.startswith(prefix):
            return "model." + stored.removeprefix(prefix)
    return ""
