"""A checkpoint as it would be with a rotated residual stream: the same function in another basis.

With Q orthogonal, hidden states h become h·Q (QuaRot, Ashkboos et al. 2024, section 3; the computational invariance of
SliceGPT): every RMSNorm gain γ is absorbed by the linears that read the norm, W ← W·diag(γ)·Q, and set to 1, which
makes the norm commute with Q; o and down, which write the stream, become Qᵀ·W (biases b·Q); the embedding E·Q; the
head W·diag(γ)·Q. Tied embeddings come apart. Nothing of it is left at run time.

A permutation commutes with the norm once its gain is permuted too: γ stays in the norm, embeddings stay tied, and no
value changes.

Values can have another basis as well: attention sums them, so that v·R in every head, R orthogonal, is
multiplied with o's columns times R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tulle.core.transform import BlockMatrix, Permutation, Transform, fold, run
from tulle.errors import UserError
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import Decoder, Layer
from tulle.models.hub import local_folder


class DenseModel:
    """Tensors of a checkpoint, block by block, with the residual stream in the basis x·T₁·T₂·… (none: as stored) and
    the values of block i in that of ``values[i]`` ``[kv_heads, b, b]``.

    Rewritten tensors are float32; ``dtypes`` is what they are stored as.
    """

    @classmethod
    def open(cls, model: str | Path) -> DenseModel:
        """A local folder, ``reference`` or a hub id, as it is stored. Raises ``UserError`` where the model is
        quantised, is of a family that is not known, or lacks tensors that its config asks for."""
        checkpoint = Checkpoint.open(local_folder(model))
        if checkpoint.packed is not None:
            raise UserError(
                f"expected an unquantised checkpoint, found {checkpoint.path.name} compressed already; give the "
                "original model"
            )
        return cls(checkpoint, checkpoint.describe())

    def __init__(
        self,
        checkpoint: Checkpoint,
        description: Decoder,
        residual: Sequence[Transform] = (),
        values: Mapping[int, BlockMatrix] | None = None,
    ):
        self.checkpoint, self.description, self.residual = checkpoint, description, tuple(residual)
        self._values = dict(values or {})
        self._permuted = all(isinstance(t, Permutation) for t in self.residual)

    def rewritten(self, residual: Sequence[Transform], values: Mapping[int, BlockMatrix]) -> DenseModel:
        """The same checkpoint in other bases, which take the place of those there are."""
        return DenseModel(self.checkpoint, self.description, residual, values)

    @property
    def tied(self) -> bool:
        """Whether the head is still the embedding."""
        return self.description.tied and self._permuted

    @property
    def embedding_dtype(self) -> torch.dtype:
        """What the embedding is stored in."""
        return self.checkpoint.info(self.description.embedding_name(self.checkpoint)).dtype

    def read_block(self, index: int) -> dict[str, Tensor]:
        """All tensors of a block by relative name."""
        layer = self.description.layers[index]
        tensors = self.checkpoint.read_layer(layer)
        if not self.residual and index not in self._values:
            return tensors
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        if index in self._values:
            self._rotate_values(layer, tensors, self._values[index])
        if not self.residual:
            return tensors
        for group in layer.groups:
            gain = tensors[f"{group.norm}.weight"] if group.norm else None
            for name in group.names:
                weight, bias = f"{name}.weight", f"{name}.bias"
                if gain is not None:
                    tensors[weight] = self._read(tensors[weight], gain)
                if group.residual:
                    tensors[weight] = run(self.residual, tensors[weight].T).T.contiguous()
                    if bias in tensors:
                        tensors[bias] = run(self.residual, tensors[bias])
        for group in layer.groups:
            if group.norm:
                tensors[f"{group.norm}.weight"] = self._gain(tensors[f"{group.norm}.weight"])
        return tensors

    def dtypes(self, index: int) -> dict[str, torch.dtype]:
        """What the tensors of a block are stored as."""
        layer = self.description.layers[index]
        return {name: self.checkpoint.info(layer.prefix + name).dtype for name in layer.tensors()}

    def embedding(self) -> Tensor:
        """E ``[V, d]``, in the stored dtype."""
        stored = self.checkpoint.read(self.description.embedding_name(self.checkpoint))
        return run(self.residual, stored.float()).to(stored.dtype) if self.residual else stored

    def closing(self) -> dict[str, Tensor]:
        """The final norm and, unless tied, the head, by full name, in the stored dtype."""
        model = self.description
        norm_name = f"{model.final_norm.name}.weight"
        norm = self.checkpoint.read(norm_name)
        if self.tied:
            return {norm_name: self._gain(norm) if self.residual else norm}
        name = model.embedding_name(self.checkpoint) if model.tied else model.head
        head = self.checkpoint.read(name)
        if self.residual:
            head = self._read(head.float(), norm.float()).to(head.dtype)
            norm = self._gain(norm)
        return {norm_name: norm, model.head: head}

    def _rotate_values(self, layer: Layer, tensors: dict[str, Tensor], rotation: BlockMatrix) -> None:
        group, mixer = layer.group("o"), layer.mixer
        (value,), (o,) = group.producers, group.names
        tensors[f"{value}.weight"] = rotation.apply(tensors[f"{value}.weight"].T).T.contiguous()
        if f"{value}.bias" in tensors:
            tensors[f"{value}.bias"] = rotation.apply(tensors[f"{value}.bias"])
        shared = mixer.heads // mixer.kv_heads
        tensors[f"{o}.weight"] = BlockMatrix(rotation.matrix.repeat_interleave(shared, 0)).fold(tensors[f"{o}.weight"])

    def _read(self, weight: Tensor, gain: Tensor) -> Tensor:
        return fold(self.residual, weight if self._permuted else weight * gain)

    def _gain(self, gain: Tensor) -> Tensor:
        """The norm's gain afterwards."""
        return run(self.residual, gain) if self._permuted else torch.ones_like(gain)
