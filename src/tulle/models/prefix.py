"""A base model's save (AutoModel's): the same tensors without ``model.`` in front, and no head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tulle.models.tensor_file import TensorInfo

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

PREFIX = "model."
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"


class Prefixed:
    """A source whose tensors get ``model.`` in front of their names."""

    plain = False

    def __init__(self, base: TensorSource):
        self._base, self.path, self.tokenizer, self.config = base, base.path, base.tokenizer, base.config
        self.files: Sequence[Path] = base.files
        self.notes = base.notes

    def names(self) -> list[str]:
        return sorted(name if name == HEAD else PREFIX + name for name in self._base.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored(name) in self._base

    def info(self, name: str) -> TensorInfo:
        return self._base.info(self._stored(name))

    def read(self, name: str) -> NDArray[Any]:
        return self._base.read(self._stored(name))

    def identity(self) -> str:
        return self._base.identity()

    def _stored(self, name: str) -> str:
        return name.removeprefix(PREFIX)


def is_base_model(source: TensorSource) -> bool:
    return EMBEDDING in source and PREFIX + EMBEDDING not in source
