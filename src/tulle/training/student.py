"""A packed model as something to train, block by block, and the dense model beside it.

Both run on the plain decoder's coroutine blocks (:mod:`tulle.models.decoder`): a student's block answers for its groups
of linears with weights that are trained on their grids (:mod:`tulle.methods.train.codes`), behind the transforms,
quantisers and selections that the packed model has in front of them. Trained are weights or steps, norms and biases;
embedding and head stay as they are, and so do routers, convolutions and what recurrent mixers have besides linears. An
expert that no token goes to is not unpacked, and has no gradient.

What is not trained is read from the file when a block runs, unless the whole model is small beside the machine's
memory (``KEPT_SHARE``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle.core.grid import Format, Grid, Quantised
from tulle.core.head_grids import HeadGrids
from tulle.format.spec import LinearSpec
from tulle.hf.attention import grids_of
from tulle.hf.packed_decoder import input_of
from tulle.hf.packed_linear import (
    dequantise,
    signed_codes,
    unpack_codes,
    unpack_mask,
    unpack_scale,
    unpack_zero,
)
from tulle.machine import memory_bytes
from tulle.methods.contract import LinearState
from tulle.methods.train.codes import HeldWeight, TrainedCodes, TrainedSteps, whole_numbers
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import DecoderBlock, GroupInput, Heads, drive, embed, final_norm, logits
from tulle.models.description import Decoder
from tulle.models.expert_pass import outputs
from tulle.models.rewrite import DenseModel
from tulle.models.state import TokenInputs

Trained = Literal["codes", "steps"]
KEPT_SHARE = 1 / 8
"""Share of the machine's memory up to which float32 weights of a model are kept from one step to the next."""


def autocast(device: torch.device | str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Products in ``dtype``, everything else in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


class Teacher:
    """The dense model: hidden states of every block, and logits."""

    def __init__(self, dense: DenseModel, device: str, dtype: torch.dtype):
        self.decoder, self._dense, self._device, self._dtype = dense.description, dense, device, dtype
        outer = {self.decoder.embedding: dense.embedding(), **dense.closing()}
        self._outer = {name: t.to(device) for name, t in outer.items()}
        self._norm = {name: self._outer[name].float() for name in self.decoder.final_norm.names()}
        self._inputs = dense.token_inputs()
        weights = sum(linear.shape[0] * linear.shape[1] for layer in self.decoder.layers for linear in layer.linears())
        self._keeps = 4 * weights <= KEPT_SHARE * memory_bytes()
        self._kept: dict[int, DecoderBlock] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        return embed(self.decoder, tokens, self._outer[self.decoder.embedding]).float()

    @torch.no_grad()
    def block(self, index: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden ``[B, T, d]`` of ``tokens`` after block ``index``, float32."""
        block = self._kept.get(index)
        if block is None:
            tensors = self._dense.read_block(index, experts=self._keeps)
            block = DecoderBlock(self.decoder, index, tensors, self._device, experts=self._keeps)
            if self._keeps:
                self._kept[index] = block
        with autocast(self._device, self._dtype):
            entering = self._inputs.join(index, hidden, tokens, lambda: self.embed(tokens))
            if self._keeps:
                found: Tensor = block(entering)
            else:
                (found,) = outputs(block, [entering], self._dense.read_expert)
        return found

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """``[T, V]`` float32 of hidden states ``[T, d]`` after the last block."""
        normed = final_norm(self.decoder, hidden, self._norm)
        head = self._outer.get(self.decoder.head, self._outer[self.decoder.embedding])
        return logits(self.decoder, normed.to(self._dtype), head.to(self._dtype)).float()


class Student(nn.Module):
    """The packed model of ``checkpoint``. ``train``: what of quantised linears is trained."""

    def __init__(self, checkpoint: Checkpoint, train: Trained, device: str, dtype: torch.dtype):
        super().__init__()
        packed = checkpoint.packed
        assert packed is not None
        self.decoder, self._device, self._dtype = checkpoint.describe(), device, dtype
        heads = grids_of(packed.attention)
        self.blocks = nn.ModuleList(
            StudentBlock(self.decoder, index, checkpoint, packed.linears, train, heads, device, dtype)
            for index in range(len(self.decoder.layers))
        )
        # Of the final norm, by the last part of their names.
        self.norm = nn.ParameterDict(
            {
                name.rpartition(".")[2]: nn.Parameter(checkpoint.read(name).to(device, torch.float32))
                for name in self.decoder.final_norm.names()
            }
        )
        self._embedding = self._table(checkpoint, self.decoder.embedding_name(checkpoint), packed.linears)
        self._inputs = TokenInputs(self.decoder, checkpoint.read_part)
        tied = self.decoder.tied
        self._head = self._embedding if tied else self._table(checkpoint, self.decoder.head, packed.linears)

    def embed(self, tokens: Tensor) -> Tensor:
        return embed(self.decoder, tokens, self._embedding).float()

    def block(self, index: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden ``[B, T, d]`` of ``tokens`` after block ``index``, float32."""
        found: Tensor = self.blocks[index](self._inputs.join(index, hidden, tokens, lambda: self.embed(tokens)))
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """``[T, V]`` float32 of hidden states ``[T, d]`` after the last block."""
        normed = final_norm(self.decoder, hidden, self.outer())
        return logits(self.decoder, normed.to(self._dtype), self._head.to(self._dtype)).float()

    def outer(self) -> dict[str, Tensor]:
        """The final norm's tensors by full name."""
        return {f"{self.decoder.final_norm.name}.{part}": tensor for part, tensor in self.norm.items()}

    def head(self, start: int, stop: int) -> Tensor:
        """Rows ``[stop − start, d]`` of the head, float32."""
        return self._head[start:stop].float()

    def _table(self, checkpoint: Checkpoint, name: str, specs: Mapping[str, LinearSpec]) -> Tensor:
        """The embedding or the head ``[V, d]``; one in codes is rounded to what the model computes in."""
        module = name.removesuffix(".weight")
        if module not in specs:
            return checkpoint.read(name).to(self._device)
        spec = specs[module]
        tensors = {suffix: checkpoint.read(f"{module}.{suffix}").to(self._device) for suffix in spec.tensors()}
        return dequantise(spec, tensors).to(self._dtype)

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """Trained tensors that are stored as they are, by full name: gains, biases, plain weights; float32."""
        for part, tensor in self.norm.items():
            yield f"{self.decoder.final_norm.name}.{part}", tensor.detach()
        for block in self.blocks:
            assert isinstance(block, StudentBlock)
            yield from block.plain()

    def linears(self) -> Iterator[LinearState]:
        """The trained linears that are packed."""
        for block in self.blocks:
            assert isinstance(block, StudentBlock)
            yield from block.linears()


class StudentBlock(nn.Module):
    """A block of the packed model: its parameters are what is trained."""

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        checkpoint: Checkpoint,
        specs: Mapping[str, LinearSpec],
        train: Trained,
        heads: HeadGrids | None,
        device: str,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._checkpoint, self._specs, self._device, self._dtype = checkpoint, specs, device, dtype
        self.layer, self._heads = decoder.layers[index], _straight(heads)
        read = {name: self._read(name).float() for norm, _ in self.layer.norms() for name in norm.names()}
        routers = {name for group in self.layer.groups if group.role == "router" for name in group.names}
        self.norms = nn.ParameterList(nn.Parameter(tensor) for tensor in read.values())
        self.biases = nn.ParameterList(
            nn.Parameter(self._read(f"{x.name}.bias").float(), requires_grad=x.name not in routers)
            for x in self.layer.linears()
            if x.bias
        )
        self.weights = nn.ModuleList(self._trained(linear.name, train) for linear in self.layer.linears())
        for name, weight in zip((linear.name for linear in self.layer.linears()), self.weights, strict=True):
            if name in routers:
                weight.requires_grad_(False)
        self._number = {linear.name: number for number, linear in enumerate(self.layer.linears())}
        self._bias = dict(zip((x.name for x in self.layer.linears() if x.bias), self.biases, strict=True))
        self._inputs = {name: input_of(checkpoint, specs, self.layer.prefix + name, device) for name in self._number}
        weights = sum(x.shape[0] * x.shape[1] for x in self.layer.linears()) * len(decoder.layers)
        self._keeps = 2 * weights <= KEPT_SHARE * memory_bytes()
        self._kept: dict[str, tuple[Quantised, Tensor | None]] = {}
        # Linears answer from here; the block only needs their shapes.
        tensors = {f"{x.name}.weight": torch.zeros(()).expand(x.shape) for x in self.layer.linears()}
        tensors |= {f"{x.name}.bias": torch.zeros(()).expand(x.shape[0]) for x in self.layer.linears() if x.bias}
        tensors |= read | {name: self._read(name).float() for name in self.layer.others()}
        block = DecoderBlock(decoder, index, tensors, device)
        self._norm_names = list(read)
        for name, tensor in zip(self._norm_names, self.norms, strict=True):
            module, _, part = name.rpartition(".")
            setattr(block.get_submodule(module), part, tensor)
        # Not a child, or its norms would be parameters twice.
        self._block = (block,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden ``[B, T, d]`` → hidden, float32."""
        with autocast(self._device, self._dtype):
            found = drive(self._block[0].steps(hidden, self._heads), self._answer)
        for inputs in self._inputs.values():
            inputs.forget()
        return found

    @torch.no_grad()
    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`Student.plain`."""
        prefix = self.layer.prefix
        for name, tensor in zip(self._norm_names, self.norms, strict=True):
            yield prefix + name, tensor.detach()
        for name, bias in self._bias.items():
            yield f"{prefix}{name}.bias", bias.detach()
        for name, number in self._number.items():
            trained = self.weights[number]
            if isinstance(trained, HeldWeight) and prefix + name not in self._specs:
                yield f"{prefix}{name}.weight", trained(torch.float32)

    @torch.no_grad()
    def linears(self) -> Iterator[LinearState]:
        """As :meth:`Student.linears`."""
        for name, number in self._number.items():
            full = self.layer.prefix + name
            match self.weights[number]:
                case TrainedCodes() as trained:
                    quantised, mask = trained.result(), trained.mask
                case TrainedSteps() as trained:
                    start, mask = self._quantised(name)
                    quantised = trained.result(start)
                case HeldWeight() as trained:
                    if full in self._specs:
                        weight = trained(torch.float32)
                        yield LinearState(full, weight, weight, mask=trained.mask)
                    continue
            weight = quantised.dequantise(mask)
            yield LinearState(full, weight, weight, mask=mask, quantised=quantised)

    def _answer(self, given: GroupInput) -> tuple[Tensor, ...]:
        if not given.x.numel():  # an expert that no token goes to
            return tuple(given.x.new_zeros(0, linear.shape[0]) for linear in given.group.linears)
        return tuple(
            functional.linear(self._inputs[name](given.x), self._weight(name), self._bias.get(name))
            for name in given.group.names
        )

    def _weight(self, name: str) -> Tensor:
        match self.weights[self._number[name]]:
            case TrainedSteps() as trained:
                return trained(whole_numbers(*self._quantised(name)), self._dtype)
            case trained:
                found: Tensor = trained(self._dtype)
                return found

    def _trained(self, name: str, train: Trained) -> nn.Module:
        spec = self._specs.get(self.layer.prefix + name)
        if spec is None or spec.bits is None:
            tensors = {"weight": self._read(f"{name}.weight")} if spec is None else self._tensors(name, spec)
            weight = tensors["weight"].float() if spec is None else dequantise(spec, tensors)
            mask = None if spec is None else unpack_mask(spec, tensors)
            held = HeldWeight(weight, mask)
            return held.requires_grad_(train == "codes")
        quantised, mask = self._unpacked(name, spec)
        if train == "codes":
            return TrainedCodes(quantised, mask)
        return TrainedSteps(quantised.scale, quantised.grid, quantised.row_scale)

    def _quantised(self, name: str) -> tuple[Quantised, Tensor | None]:
        found = self._kept.get(name)
        if found is None:
            found = self._unpacked(name, self._specs[self.layer.prefix + name])
            if self._keeps:
                self._kept[name] = found
        return found

    def _unpacked(self, name: str, spec: LinearSpec) -> tuple[Quantised, Tensor | None]:
        """Codes and mask as the file has them."""
        return unpacked(spec, self._tensors(name, spec))

    def _tensors(self, name: str, spec: LinearSpec) -> dict[str, Tensor]:
        return {suffix: self._read(f"{name}.{suffix}") for suffix in spec.tensors()}

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(self.layer.prefix + name).to(self._device)


def unpacked(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> tuple[Quantised, Tensor | None]:
    """Codes, grid and mask of a quantised linear's tensors by suffix."""
    assert spec.bits is not None
    grid = Grid(spec.bits, spec.group_size, spec.symmetric, spec.scale_bits, cast(Format, spec.format))
    codes, mask = unpack_codes(spec, tensors)
    scale, row = unpack_scale(spec, tensors), None
    if spec.format == "nvfp4":
        row = (tensors["tensor_scale"] / 2).expand(spec.shape[0]).contiguous()
    elif spec.format == "int" and spec.scale_bits == 8:
        row = tensors["row_scale"].float()
    zero = torch.zeros_like(scale) if spec.symmetric else unpack_zero(spec, tensors).float()
    return Quantised(grid, signed_codes(spec, codes), scale, zero, row), mask


def _straight(grids: HeadGrids | None) -> Heads | None:
    """Rounds queries, keys and values; gradients pass straight through, as in
    :class:`tulle.core.quantised_input.QuantisedInput`."""
    if grids is None:
        return None

    def rounded(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            found: Any = grids(*given)
        # Rounded in the rotated basis: the gradient must know the rotation.
        free: Any = HeadGrids(hadamard=grids.hadamard)(*given)
        q, k, v = (f + (r - f).detach() for f, r in zip(free, found, strict=True))
        return q, k, v

    return rounded
