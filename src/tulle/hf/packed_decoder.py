"""A packed folder on the plain decoder (:mod:`tulle.models.decoder`): read again, one group of linears at a time.

Weights come from the bytes by the format's own reader (:func:`tulle.format.pack.unpack_linear`), which checks them;
nothing is kept from one group to the next. Inputs go through the transforms, quantisers and selections of the specs, as
in :class:`tulle.hf.packed_linear.PackedLinear`, but products are of floats: rounded inputs times rounded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tulle.core.quantised_input import QuantisedInput
from tulle.core.transform import Transform
from tulle.format.spec import LinearSpec
from tulle.hf.attention import grids_of
from tulle.hf.packed_linear import InputTransform, input_grid, input_selection
from tulle.models.checkpoint import Checkpoint, unpacked_rows
from tulle.models.decoder import DecoderBlock
from tulle.models.description import Layer, Linear
from tulle.models.state import TokenInputs


class PackedDecoder:
    """The model of ``checkpoint``, whose blocks compute in ``dtype``.

    Raises ``UserError``, here and later, where the folder is not of one whole model.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        packed = checkpoint.packed
        self.decoder, self.device, self._dtype = checkpoint.describe(), device, dtype
        self._checkpoint, self._inputs = checkpoint, TokenInputs(self.decoder, checkpoint.read_part)
        self._specs: Mapping[str, LinearSpec] = {} if packed is None else packed.linears
        self._heads = None if packed is None else grids_of(packed.attention)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden ``[B, T, d]`` of tokens ``[B, T]``."""
        seen, places = tokens.unique(return_inverse=True)
        rows = (
            self._checkpoint.read_part(self.decoder.embedding_name(self._checkpoint), seen).float()
            * self.decoder.embedding_scale
        )
        return rows[places].to(self.device, self._dtype)

    def head(self, start: int, stop: int) -> Tensor:
        """Rows ``[stop − start, d]`` of the head, float32."""
        name = self.decoder.embedding_name(self._checkpoint) if self.decoder.tied else self.decoder.head
        return self._checkpoint.read_part(name, torch.arange(start, stop)).float().to(self.device)

    def outer(self) -> dict[str, Tensor]:
        """The final norm's tensors, and the head's bias where it has one, float32, by full name."""
        bias = [self.decoder.head.removesuffix("weight") + "bias"] if self.decoder.head_bias else []
        names = [*self.decoder.final_norm.names(), *bias]
        return {name: self._checkpoint.read(name).to(self.device, torch.float32) for name in names}

    @torch.no_grad()
    def block(self, index: int, hidden: Sequence[Tensor], tokens: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states ``[B, T, d]`` of several batches of ``tokens`` after block ``index``."""
        layer = self.decoder.layers[index]
        block = DecoderBlock(self.decoder, index, self._tensors(layer), self.device, self._dtype, experts=False)
        running = [
            block.steps(self._inputs.join(index, states, own, partial(self.embed, own)), self._heads)
            for states, own in zip(hidden, tokens, strict=True)
        ]
        given = [next(steps) for steps in running]
        ends: list[Tensor] = []
        while not ends:
            linears = [self._linear(layer.prefix, linear) for linear in given[0].group.linears]
            for i, (steps, at) in enumerate(zip(running, given, strict=True)):
                try:
                    given[i] = steps.send(tuple(linear(at.x) for linear in linears))
                except StopIteration as end:
                    ends.append(end.value)
        return ends

    def _tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Of a block without its experts, by relative name; those of linears, which answer from elsewhere, are only
        shapes."""
        linears = {name: shape for group in layer.groups for x in group.linears for name, shape in x.tensors().items()}
        nothing = torch.zeros((), device=self.device, dtype=self._dtype)
        return {
            name: nothing.expand(linears[name]) if name in linears else self._checkpoint.read(layer.prefix + name)
            for name in layer.tensors_without_experts()
        }

    def _linear(self, prefix: str, linear: Linear) -> Callable[[Tensor], Tensor]:
        """x ``[…, C_in]`` → y, with what stands in front of the linear."""
        name = prefix + linear.name
        spec = self._specs.get(name)
        if spec is None:
            stored = self._checkpoint.read(f"{name}.weight")
        else:
            stored = unpacked_rows(self._checkpoint.source.read, name, spec)
        weight = stored.to(self.device, self._dtype)
        bias = self._checkpoint.read(f"{name}.bias").to(self.device, self._dtype) if linear.bias else None
        inputs = input_of(self._checkpoint, self._specs, name, self.device)

        def answer(x: Tensor) -> Tensor:
            if not x.numel():  # an expert that no token went to
                return x.new_zeros(*x.shape[:-1], len(weight))
            found = functional.linear(inputs(x), weight, bias)
            inputs.forget()
            return found

        return answer


def input_of(
    checkpoint: Checkpoint, specs: Mapping[str, LinearSpec], name: str, device: str | torch.device
) -> QuantisedInput:
    """What a packed folder has in front of the linear ``name``; nothing for one that is not in ``specs``."""
    spec = specs.get(name)
    if spec is None:
        return QuantisedInput((), None)
    tensors = {suffix: checkpoint.read(f"{name}.{suffix}").to(device) for suffix in spec.input_tensors()}
    selection = input_selection(spec, tensors.get("input_score"))
    return QuantisedInput(_transforms(checkpoint, specs, name, device), input_grid(spec), selection)


def _transforms(
    checkpoint: Checkpoint, specs: Mapping[str, LinearSpec], name: str, device: str | torch.device
) -> tuple[Transform, ...]:
    """The maps in front of a linear; a sibling may hold their tensors."""
    if not specs[name].transform:
        return ()
    holder = specs[name].transform_of or name
    own = specs[holder]
    maps = InputTransform(own.transform, own.shape[1], device)
    for suffix in own.transform_tensors():
        maps.get_buffer(suffix.removeprefix("transform.")).copy_(checkpoint.read(f"{holder}.{suffix}"))
    return tuple(maps.maps())
