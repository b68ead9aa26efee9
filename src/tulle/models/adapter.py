"""A PEFT adapter folder, merged with its base model (LoRA, Hu et al. 2021).

``adapter_config.json`` names the base model; ``adapter_model.safetensors`` holds, for every adapted linear W
``[C_out, C_in]``, A ``[r, C_in]`` (lora_A) and B ``[C_out, r]`` (lora_B):

    W' = W + s·B·A,   s = lora_alpha/r, or lora_alpha/√r with use_rslora

in float32, which is what the two compute side by side. Whole modules that were trained too (modules_to_save) and biases
take the place of the base's. Other kinds of adapters are refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.identity import identity
from tulle.models.tensor_file import TensorFile, TensorInfo, as_float32

if TYPE_CHECKING:
    from tulle.models.source import TensorSource

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
PART = re.compile(r"(.*)\.lora_(A|B)(?:\.default)?\.weight")
NAME = re.compile(r"\^?[\w.]+")
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,), "layer_replication": (None,),
    "megatron_config": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
}  # fmt: skip
"""Keys of ``adapter_config.json`` that change what an adapter computes, and the values that are read."""


class Merged:
    """A base model with an adapter added to its tensors. Adapted linears come out in float32."""

    plain = False

    def __init__(self, path: Path, settings: Mapping[str, Any], base: TensorSource):
        self.path, self._base, self._settings = path, base, settings
        self.config = base.config
        self.tokenizer = path if any((path / file).is_file() for file in TOKENIZERS) else base.tokenizer
        self._file = TensorFile(path / WEIGHTS)
        self.files: Sequence[Path] = (*base.files, path / WEIGHTS)
        self._adapted: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        for name in self._file.names():
            self._sort(name)
        for name, parts in self._adapted.items():
            self._check(name, parts)
        self.notes = [
            *base.notes,
            f"{len(self._adapted)} linears of {base.path.name} have the adapter {path.name} added, in float32",
        ]

    def names(self) -> list[str]:
        return self._base.names()

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def info(self, name: str) -> TensorInfo:
        if name in self._replaced:
            return self._file.info(self._replaced[name])
        found = self._base.info(name)
        return TensorInfo("F32", found.shape, found.file) if name in self._adapted else found

    def read(self, name: str) -> NDArray[Any]:
        if name in self._replaced:
            found = self._file.tensor(self._replaced[name])
        else:
            found = self._base.read(name)
        if name not in self._adapted:
            return found
        a, b = (self._part(self._adapted[name][part]) for part in "AB")
        weight = np.array(as_float32(found, self.info_of_base(name)))
        weight += np.float32(self._scale(name, len(a))) * (b @ a)
        return weight

    def info_of_base(self, name: str) -> str:
        """Dtype of what an adapter is added to."""
        return (self._file.info(self._replaced[name]) if name in self._replaced else self._base.info(name)).dtype

    def identity(self) -> str:
        return hashlib.sha256((self._base.identity() + identity(self._settings, [self._file])).encode()).hexdigest()

    def _sort(self, name: str) -> None:
        """Files a stored tensor under the name of the model's tensor that it changes."""
        if not name.startswith(PREFIX):
            raise self._unknown(name)
        inner = name.removeprefix(PREFIX)
        if part := PART.fullmatch(inner):
            self._adapted.setdefault(f"{part[1]}.weight", {})[part[2]] = name
        elif "lora_" in inner or inner not in self._base:
            raise self._unknown(name)
        else:
            self._replaced[inner] = name

    def _unknown(self, name: str) -> UserError:
        return UserError(
            f"expected lora_A and lora_B of linears, or tensors of the base model, found {name} in {self.path.name}; "
            "merge the adapter with peft and give the merged model"
        )

    def _check(self, name: str, parts: Mapping[str, str]) -> None:
        if name not in self._base:
            raise self._unknown(parts.get("A") or parts["B"])
        shape = self._base.info(name).shape
        shapes = [self._file.info(parts[part]).shape if part in parts else None for part in "AB"]
        a, b = shapes
        if a is None or b is None or not (len(a) == len(b) == len(shape) == 2) or (b[0], a[1]) != shape or a[0] != b[1]:
            raise UserError(
                f"expected lora_A [r, {shape[-1]}] and lora_B [{shape[0]}, r] for {name}, found {shapes}; the adapter "
                "is of another base model"
            )
        for part in parts.values():
            if not self._file.info(part).is_float:
                raise UserError(f"expected {part} in floats, found {self._file.info(part).dtype}; copy it again")

    def _part(self, name: str) -> NDArray[np.float32]:
        return as_float32(self._file.tensor(name), self._file.info(name).dtype)

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self._pattern("alpha_pattern", module, self._settings.get("lora_alpha", 8))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise UserError(f"expected a number as lora_alpha in {CONFIG}, found {alpha!r}; repair it")
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """The value for a module whose name ends with a key.

        peft takes keys as regular expressions; those that are more than a name are refused, since a file must not make
        a reader search without end.
        """
        for ending, value in (self._settings.get(key) or {}).items():
            if not NAME.fullmatch(ending):
                raise UserError(
                    f"expected names of modules in {key} of {CONFIG}, found the pattern {ending!r}; merge the adapter "
                    "with peft and give the merged model"
                )
            if f".{module}".endswith(f".{ending.removeprefix('^')}"):
                return value
        return default


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (path / CONFIG).is_file() and not any((path / file).is_file() for file in whole)


def open_adapter(path: Path) -> Merged:
    """An adapter with its base model, which must be on this machine, in the hub's cache, or can be fetched.

    Raises ``UserError`` where it is not, and for adapters other than LoRA by their name.
    """
    from tulle.models.hub import local_folder
    from tulle.models.source import open_source, read_json

    settings = read_json(path / CONFIG, "an adapter's configuration")
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind != "LORA":
        raise UserError(
            f"expected an adapter of peft_type LORA, found {kind!r} in {path.name}; merge it with peft and give the "
            "merged model"
        )
    for key, values in REFUSED.items():
        if key in settings and settings[key] not in values:
            raise UserError(
                f"expected a LoRA adapter with {key} {values[0]}, found {settings[key]!r} in {path.name}; merge it "
                "with peft and give the merged model"
            )
    if not (path / WEIGHTS).is_file():
        found = f"{PICKLED}, which is never loaded: save it as safetensors" if (path / PICKLED).is_file() else "none"
        raise UserError(f"expected {WEIGHTS} in {path}, found {found}")
    if not isinstance(base, str) or not base:
        raise UserError(f"expected the base model's name in {path / CONFIG}, found {base!r}; write its path there")
    beside = path / base
    try:
        folder = beside if beside.is_dir() else local_folder(base)
        if is_adapter(folder):
            raise UserError("an adapter in its place")
        return Merged(path, settings, open_source(folder))
    except UserError as error:
        if str(error).startswith("expected lora"):
            raise
        raise UserError(
            f"expected {path.name}'s base model {base!r} at hand (an adapter is no model), found: {error}; or write "
            f"the base's path into {CONFIG}"
        ) from None
