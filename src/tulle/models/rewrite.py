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
from tulle.models.description import STREAM_READERS, Decoder, Layer, LinearGroup, Norm, require_plain_values
from tulle.models.features import features
from tulle.models.hub import local_folder
from tulle.models.state import TokenInputs

NOT_ROTATED = {
    "layer norms": "which take off the mean of the channels",
    "norms with a bias": "which adds to single channels",
    "norms after attention and feed-forward": "whose gains multiply single channels",
}
"""What does not commute with a rotation of the residual stream, of :func:`tulle.models.features.features`, and why."""


def require_basis(model: Decoder, residual: Sequence[Transform], values: Mapping[int, BlockMatrix]) -> None:
    """Raises ``UserError`` for a change of basis that would change the model's function."""
    special = features(model)
    if not all(isinstance(t, Permutation) for t in residual):
        for what, why in NOT_ROTATED.items():
            if what in special:
                raise UserError(
                    f"expected a residual stream that can be rotated, found {what} ({why}) in {model.model_type}; "
                    "leave the rotation of the residual stream out"
                )
    for index in values:
        require_plain_values(model.layers[index].group("o").producers)


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
        """The same checkpoint in other bases, which take the place of those there are. Raises ``UserError`` where a
        part of the model does not commute with them."""
        require_basis(self.description, residual, values)
        return DenseModel(self.checkpoint, self.description, residual, values)

    @property
    def tied(self) -> bool:
        """Whether the head is still the embedding."""
        return self.description.tied and self._permuted

    @property
    def embedding_dtype(self) -> torch.dtype:
        """What the embedding is stored in."""
        return self.checkpoint.info(self.description.embedding_name(self.checkpoint)).dtype

    def read_block(self, index: int, experts: bool = True) -> dict[str, Tensor]:
        """All tensors of a block by relative name; or all but those of its experts."""
        layer = self.description.layers[index]
        if not experts:
            names = layer.tensors_without_experts()
            return self._rewritten(layer, layer.groups, self.checkpoint.read_layer(layer, names), index in self._values)
        tensors = self.checkpoint.read_layer(layer, layer.tensors())
        return self._rewritten(layer, layer.all_groups(), tensors, index in self._values)

    def read_expert(self, index: int, expert: int) -> dict[str, Tensor]:
        """The tensors of one of a block's experts by relative name."""
        layer = self.description.layers[index]
        tensors = self.checkpoint.read_layer(layer, layer.tensors(expert))
        if not self.residual:
            return tensors
        groups = layer.experts[expert].groups
        norm = groups[0].norm
        # Of the block's norm the gain is asked for, which its readers take over.
        outer = {} if norm is None else self.checkpoint.read_layer(layer, norm.names())
        found = self._rewritten(layer, groups, tensors | outer, False)
        return {name: found[name] for name in tensors}

    def _rewritten(
        self, layer: Layer, groups: Sequence[LinearGroup], tensors: dict[str, Tensor], values: bool
    ) -> dict[str, Tensor]:
        """Tensors of ``groups``, and whatever norms are among them, in the new bases; ``values``: those of values,
        too."""
        if not self.residual and not values:
            return tensors
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        if values:
            self._rotate_values(layer, tensors, self._values[layer.index])
        if not self.residual:
            return tensors
        for group in groups:
            norm = group.norm if group.role in STREAM_READERS else None
            gain = None if norm is None else tensors[f"{norm.name}.weight"] + norm.offset
            for name in group.names:
                weight, bias = f"{name}.weight", f"{name}.bias"
                if gain is not None:
                    tensors[weight] = self._read(tensors[weight], gain)
                elif group.role in STREAM_READERS:
                    tensors[weight] = fold(self.residual, tensors[weight])
                if group.adds:
                    tensors[weight] = run(self.residual, tensors[weight].T).T.contiguous()
                    if bias in tensors:
                        tensors[bias] = run(self.residual, tensors[bias])
        for norm in layer.stream_norms():
            for name in norm.names():
                if name in tensors:
                    tensors[name] = self._of_norm(tensors[name], norm)
        return tensors

    def token_inputs(self) -> TokenInputs:
        """The inputs that blocks have of their own."""
        return TokenInputs(self.description, self.read_part)

    def per_layer_tensors(self) -> dict[str, Tensor]:
        """What they are made of, by full name, in the stored dtype."""
        return {name: self.read_part(name) for name in self.description.per_layer_tensors()}

    def read_part(self, name: str, rows: Tensor | None = None, columns: slice | None = None) -> Tensor:
        """Of these tensors, some rows or columns, in the stored dtype."""
        stored = self.checkpoint.read_part(name, rows, columns)
        settings = self.description.per_layer
        if not self.residual or settings is None or name != settings.projection:
            return stored
        return fold(self.residual, stored.float()).to(stored.dtype)

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
        norm = model.final_norm
        stored = {name: self.checkpoint.read(name) for name in norm.names()}
        found = {name: self._of_norm(t, norm) if self.residual else t for name, t in stored.items()}
        if not self.tied:
            head = self.checkpoint.read(model.embedding_name(self.checkpoint) if model.tied else model.head)
            if self.residual:
                head = self._read(head.float(), stored[f"{norm.name}.weight"].float() + norm.offset).to(head.dtype)
            found[model.head] = head
        if model.head_bias:
            bias = model.head.removesuffix("weight") + "bias"
            found[bias] = self.checkpoint.read(bias)
        return found

    def _rotate_values(self, layer: Layer, tensors: dict[str, Tensor], rotation: BlockMatrix) -> None:
        group, mixer = layer.group("o"), layer.attention
        (value,), (o,) = group.producers, group.names
        weight, bias = f"{value.name}.weight", f"{value.name}.bias"
        tensors[weight] = tensors[weight].clone()
        tensors[weight][value.rows] = rotation.apply(tensors[weight][value.rows].T).T
        if bias in tensors:
            tensors[bias] = tensors[bias].clone()
            tensors[bias][value.rows] = rotation.apply(tensors[bias][value.rows])
        shared = mixer.heads // mixer.kv_heads
        tensors[f"{o}.weight"] = BlockMatrix(rotation.matrix.repeat_interleave(shared, 0)).fold(tensors[f"{o}.weight"])

    def _read(self, weight: Tensor, gain: Tensor) -> Tensor:
        return fold(self.residual, weight if self._permuted else weight * gain)

    def _of_norm(self, tensor: Tensor, norm: Norm) -> Tensor:
        """The norm's gain or bias afterwards: permuted, or a gain of 1."""
        return run(self.residual, tensor) if self._permuted else torch.full_like(tensor, 1 - norm.offset)
