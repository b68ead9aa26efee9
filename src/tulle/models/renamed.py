"""Sources whose tensors are read under other names: a base model's save, and the text part of a larger model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tulle.models.tensor_file import TensorInfo

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

PREFIX = "model."
BACKBONE = "backbone."
"""What Nemotron-H's files have in its place."""
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"


class Renamed:
    """``stored``: the base's names by the names that its tensors are read under; others are left out."""

    plain = False

    def __init__(self, base: TensorSource, stored: Mapping[str, str]):
        self._base, self._stored = base, stored
        self.path, self.tokenizer, self.config = base.path, base.tokenizer, base.config
        self.files: Sequence[Path] = base.files
        self.notes = base.notes

    def names(self) -> list[str]:
        return sorted(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def info(self, name: str) -> TensorInfo:
        return self._base.info(self._stored.get(name, name))

    def read(self, name: str) -> NDArray[Any]:
        return self._base.read(self._stored.get(name, name))

    def identity(self) -> str:
        return self._base.identity()


def base_model(source: TensorSource) -> Renamed:
    """A base model's save (AutoModel's): the same tensors without ``model.`` in front, and no head of its own."""
    return Renamed(source, {name if name == HEAD else PREFIX + name: name for name in source.names()})


def without_backbone(source: TensorSource) -> Renamed:
    """The same tensors with ``model.`` in the place of ``backbone.``, as transformers names them."""
    return Renamed(source, {_plain_prefix(name): name for name in source.names()})


def has_backbone(source: TensorSource) -> bool:
    return source.config.get("model_type") == "nemotron_h" and any(n.startswith(BACKBONE) for n in source.names())


def _plain_prefix(name: str) -> str:
    return PREFIX + name.removeprefix(BACKBONE) if name.startswith(BACKBONE) else name


def is_base_model(source: TensorSource) -> bool:
    return EMBEDDING in source and PREFIX + EMBEDDING not in source
