"""A folder whose weights are pickled (``pytorch_model.bin``, ``*.pth``), for conversion alone.

A pickle is a program. torch's ``weights_only`` runs none but one that builds tensors; even so no command opens such a
file but ``tulle export --to dense``, which writes safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tulle.errors import UserError
from tulle.models.checkpoint import DTYPES
from tulle.models.identity import add_file
from tulle.models.source import missing, pickles_of, read_json
from tulle.models.tensor_file import TensorInfo

NAMES = {dtype: name for name, dtype in DTYPES.items()}
META = "tok_embeddings.weight"
"""A name of Llama's first publication (consolidated.00.pth), whose layout is not Hugging Face's."""


class Pickled:
    """The tensors of all pickled files of a folder, mapped."""

    plain = False

    def __init__(self, path: Path):
        self.path = self.tokenizer = path
        self.config: dict[str, Any] = read_json(path / "config.json", "a model's config.json")
        self.files: Sequence[Path] = pickles_of(path)
        self._tensors: dict[str, Tensor] = {}
        self._holders: dict[str, Path] = {}
        for file in self.files:
            for name, tensor in _load(file).items():
                if name in self._tensors:
                    raise UserError(
                        f"expected every tensor once in {path}, found {name} in {self._holders[name].name} and "
                        f"{file.name}; move what is not the model out of the folder"
                    )
                self._tensors[name], self._holders[name] = tensor, file
        if META in self._tensors:
            raise UserError(
                f"expected Hugging Face's names of tensors, found {META} in {path.name}: it is Meta's own layout; "
                "convert it with transformers' convert_llama_weights_to_hf"
            )
        self.notes = [f"{len(self.files)} pickled files were read by torch with weights_only"]

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise missing(name, self.path)
        found = self._tensors[name]
        return TensorInfo(NAMES.get(found.dtype, str(found.dtype)), tuple(found.shape), self._holders[name])

    def read(self, name: str) -> NDArray[Any]:
        self.info(name)
        found = self._tensors[name].contiguous()
        bits: NDArray[Any] = (found.view(torch.uint16) if found.dtype == torch.bfloat16 else found).numpy()
        return np.array(bits)

    def identity(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            add_file(digest, file, [(0, 4096)])
        return digest.hexdigest()


def _load(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # not a zip file, which older torch wrote, or no tensors alone
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"expected tensors alone in {file}, found a pickle that torch refuses with weights_only "
                f"({line[:120]}); convert it where it came from"
            ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict", found.get("model")), dict):
        found = found.get("state_dict", found.get("model"))
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"expected tensors by name in {file}, found something else; give a model's weights")
    return {str(name): tensor for name, tensor in found.items()}
