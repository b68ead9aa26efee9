"""The plain torch decoder of all families, block by block.

A block is a coroutine: :meth:`DecoderBlock.steps` yields the input of every group of linears and is sent their
outputs. Whoever drives it sees every input without hooks, may park a sequence at a group, change the group's weights
and go on from there: no part of a block is computed twice.

It computes what transformers computes, in the block's dtype: norms and rotary tables in float32, softmax attention by
torch. What a description asks for and this file does not do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle.core import attention
from tulle.errors import UserError
from tulle.models.description import Attention, Decoder, Layer, LinearGroup, Norm, Rotary
from tulle.models.rotary import frequencies

Heads = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Queries ``[B, H, T, head_dim]`` and keys ``[B, H_kv, T, head_dim]`` after the rotation, and values, to what the
attention is given instead (their quantisers)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
"""By the names of ``GatedMLP.activation``."""


@dataclass
class GroupInput:
    """What a block yields at a group of linears, and takes back.

    The parked generator holds no large tensor but through this object. So both tensors can be moved away while it is
    parked: ``del given.x, given.residual``, and set ``residual`` again before the next ``send`` (``x`` is not needed
    any more).
    """

    group: LinearGroup
    x: Tensor
    """``[B, T, C_in]``."""
    residual: Tensor
    """The residual stream ``[B, T, d]`` at this place."""
    adds: bool
    """Whether the group's output is added to the residual stream (o, down)."""

    @property
    def role(self) -> str:
        return self.group.role


Steps = Generator[GroupInput, tuple[Tensor, ...], Tensor]


class DecoderBlock(nn.Module):
    """Decoder layer ``index`` with weights: hidden ``[B, T, d]`` → hidden ``[B, T, d]``, causal, positions 0 … T − 1.

    ``tensors`` holds the layer's tensors by relative name; one that already has the device and dtype is not copied.
    Linears and norms are submodules under their names in the checkpoint. Sequences of one batch are padded at the
    right, where causal attention keeps padding away from real tokens.

    Raises ``UserError`` for missing, unknown or misshapen tensors and for parts that are not implemented here.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        tensors: Mapping[str, Tensor],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.layer = decoder.layers[index]
        require_implemented(decoder, self.layer)
        check_tensors(self.layer.prefix, self.layer.tensors(), tensors)
        self.rotary = decoder.rotary[cast(str, self.layer.mixer.rotary)]
        for linear in self.layer.linears():
            with torch.device("meta"):
                module = nn.Linear(linear.shape[1], linear.shape[0], bias=linear.bias)
            _attach(self, linear.name, module)
        for norm, width in self.layer.norms():
            with torch.device("meta"):
                _attach(self, norm.name, RMSNorm(norm, width))
        self.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: that of the first norm's weight."""
        return cast(Tensor, self.get_submodule(self.layer.mixer_norm.name).weight).dtype

    def steps(self, hidden: Tensor, heads: Heads | None = None) -> Steps:
        """Yields every group's input in order and is sent the tuple of its linears' outputs; returns the block's
        output ``[B, T, d]`` in the block's dtype (``StopIteration.value``).

        Outputs are in the order of ``group.linears``, biases included. Between a yield and the next send only the
        yielded :class:`GroupInput` holds tensors of the sequence.
        """
        layer, mixer = self.layer, self.layer.mixer
        given = self._given("qkv", hidden.to(self.dtype), layer.mixer_norm)
        del hidden
        q, k, v = yield given
        mixed = self._attend(mixer, q, k, v, heads)
        del q, k, v
        given = GroupInput(layer.group("o"), mixed, given.residual, adds=True)
        del mixed
        (y,) = yield given
        given = self._given("gate_up", given.residual + y, layer.feed_forward_norm)
        del y
        gate, up = yield given
        inner = ACTIVATIONS[layer.feed_forward.activation](gate) * up
        del gate, up
        given = GroupInput(layer.group("down"), inner, given.residual, adds=True)
        del inner
        (y,) = yield given
        return given.residual + y

    def forward(self, hidden: Tensor, heads: Heads | None = None) -> Tensor:
        """The block's output ``[B, T, d]``, by its own submodules, so that hooks and replaced linears take part."""
        return drive(self.steps(hidden, heads), lambda given: run_group(self, given.group, given.x))

    def _given(self, role: str, hidden: Tensor, norm: Norm) -> GroupInput:
        return GroupInput(self.layer.group(role), self.get_submodule(norm.name)(hidden), hidden, adds=False)

    def _attend(self, mixer: Attention, q: Tensor, k: Tensor, v: Tensor, heads: Heads | None) -> Tensor:
        """Attention of projected queries, keys and values, heads side by side: ``[B, T, H·head_dim]``."""
        batch, length = q.shape[:2]
        q, k, v = (x.reshape(batch, length, -1, mixer.head_dim) for x in (q, k, v))
        if mixer.q_norm is not None:
            q = self.get_submodule(mixer.q_norm.name)(q)
        if mixer.k_norm is not None:
            k = self.get_submodule(mixer.k_norm.name)(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        cos, sin = rotary_table(self.rotary, length, q.device, q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if heads is not None:
            q, k, v = heads(q, k, v)
        return attend(q, k, v, mixer.window, mixer.scale).transpose(1, 2).reshape(batch, length, -1)


class RMSNorm(nn.Module):
    """x/√(mean x² + ε) in float32, times w ``[width]`` in x's dtype (Zhang & Sennrich 2019)."""

    def __init__(self, norm: Norm, width: int):
        super().__init__()
        require_rms(norm)
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, scale: float | None = None) -> Tensor:
    """Causal softmax attention ``[B, H, T, head_dim]``; k and v ``[B, H_kv, T, head_dim]``, each for H/H_kv heads."""
    if attention.takes(q, k, v):
        return attention.flash_attention(q, k, v, window, scale)
    shared, length = q.shape[1] // k.shape[1], q.shape[2]
    if window is None or window >= length:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared > 1)
    if shared > 1:
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    mask = window_mask(length, window, q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@lru_cache(maxsize=4)
def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool ``[T, T]``: token i sees tokens i − window + 1 … i."""
    with torch.inference_mode(False):
        return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[…, T, dim]`` with channels i and i + dim/2 rotated by the tables ``[T, dim]``."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@lru_cache(maxsize=16)
def rotary_table(
    rotary: Rotary, length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, dim]`` of positions 0 … T − 1, computed in float32."""
    found, scaling = frequencies(rotary, length)
    with torch.inference_mode(False), torch.no_grad():
        angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.from_numpy(found)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(device, dtype), (angles.sin() * scaling).to(device, dtype)


def drive(steps: Steps, answer: Callable[[GroupInput], tuple[Tensor, ...]]) -> Tensor:
    """Runs a block to its end, every group's outputs being what ``answer`` says; the block's output."""
    try:
        given = next(steps)
        while True:
            given = steps.send(answer(given))
    except StopIteration as end:
        return cast(Tensor, end.value)


def run_group(block: nn.Module, group: LinearGroup, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a group's linears, as they are in the block now."""
    return tuple(block.get_submodule(name)(x) for name in group.names)


def embed(decoder: Decoder, tokens: Tensor, table: Tensor) -> Tensor:
    """Hidden ``[B, T, d]`` of tokens ``[B, T]``, in the dtype of the table ``[V, d]``."""
    hidden = functional.embedding(tokens, table)
    return hidden if decoder.embedding_scale == 1 else hidden * decoder.embedding_scale


def final_norm(decoder: Decoder, hidden: Tensor, weight: Tensor) -> Tensor:
    require_rms(decoder.final_norm)
    return rms_norm(hidden, weight, decoder.final_norm.eps)


def logits(decoder: Decoder, normed: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits ``[…, V]`` of what the final norm gives; ``table`` is the head's, or the embedding's when tied."""
    _require(decoder.logit_scale == 1, "logit_scale", decoder.logit_scale)
    _require(decoder.logit_soft_cap is None, "logit_soft_cap", decoder.logit_soft_cap)
    _require(not decoder.head_bias, "head_bias", True)
    return functional.linear(normed, table, bias)


class PlainDecoder:
    """The whole model, one block in memory at a time.

    ``read_block(index)`` gives a layer's tensors by relative name; ``outer`` holds embedding, final norm and, unless
    tied, head by full name.
    """

    def __init__(
        self,
        decoder: Decoder,
        read_block: Callable[[int], Mapping[str, Tensor]],
        outer: Mapping[str, Tensor],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.decoder = decoder
        self._read_block, self.device, self._dtype = read_block, device, dtype
        self._outer = {name: t.to(device, dtype) for name, t in outer.items()}

    def block(self, index: int) -> DecoderBlock:
        return DecoderBlock(self.decoder, index, self._read_block(index), self.device, self._dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of tokens ``[B, T]``."""
        hidden = self.embed(tokens)
        for index in range(len(self.decoder.layers)):
            hidden = self.block(index)(hidden)
        return self.predict(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        return embed(self.decoder, tokens.to(self.device), self.embedding())

    def embedding(self) -> Tensor:
        """``[V, d]``."""
        return self._outer[self.decoder.embedding_name(self._outer)]

    def head(self) -> Tensor:
        """``[V, d]``."""
        return self.embedding() if self.decoder.tied else self._outer[self.decoder.head]

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of the last block's output."""
        return final_norm(self.decoder, hidden, self._outer[f"{self.decoder.final_norm.name}.weight"])

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits of the last block's output."""
        return logits(self.decoder, self.normed(hidden), self.head())


def require_implemented(decoder: Decoder, layer: Layer) -> None:
    """Raises ``UserError`` for what a description asks for and this decoder does not do."""
    mixer = layer.mixer
    _require(mixer.rotary is not None, "rotary", None)
    table = decoder.rotary[cast(str, mixer.rotary)]
    _require(table.dim == mixer.head_dim, "rotary dim", f"{table.dim} of {mixer.head_dim} channels")
    _require(mixer.soft_cap is None, "soft_cap", mixer.soft_cap)
    _require(not mixer.sinks, "sinks", mixer.sinks)
    _require(not mixer.output_gate, "output_gate", mixer.output_gate)
    _require(layer.feed_forward.activation in ACTIVATIONS, "activation", layer.feed_forward.activation)


def require_rms(norm: Norm) -> None:
    _require(norm.kind == "rms", f"norm {norm.name}", norm.kind)
    _require(norm.offset == 0, f"offset of norm {norm.name}", norm.offset)
    _require(not norm.bias, f"bias of norm {norm.name}", norm.bias)


def check_tensors(prefix: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Raises ``UserError`` unless the tensors' names and shapes are those of the description."""
    for name in wanted.keys() ^ found.keys():
        what = "tensor that the config asks for" if name in wanted else "no tensor that the config does not know"
        state = "none" if name in wanted else f"one of shape {tuple(found[name].shape)}"
        raise UserError(f"expected a {what}, {prefix}{name}, found {state}; check the checkpoint against its config")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"expected shape {shape} for {prefix}{name}, found {tuple(found[name].shape)}; check the checkpoint "
                "against its config"
            )


def _require(holds: bool, what: str, value: Any) -> None:
    if not holds:
        raise UserError(f"expected a model without {what}, found {value!r}; the plain decoder does not do it yet")


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module under a dotted name, with empty modules between."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = cast(nn.Module, getattr(root, part))
    root.add_module(last, module)
