"""What stands between two blocks: the residual stream, and beside it what later blocks read of each token.

The state is one tensor ``[B, T, W]``: the stream's d channels, then keys and values of earlier layers that this block
or a later one attends to (``Attention.kv_from``). So whoever drives blocks hands on one tensor, in memory or through
files, on the dense as on the compressed path, and gradients flow back through it. Keys and values stand in it as they
are after norms and rotation, and before quantisers, which are the reader's.

A block with an input of its own (``Layer.input_gate``) finds that behind all else: :meth:`TokenInputs.join` puts it
there just before the block runs, for it follows from the tokens and their embeddings alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tulle.models.description import Decoder, PerLayerEmbedding
from tulle.models.norms import normed

OWN = "own input"
Beside = dict[str, Tensor]
"""What a block has beside the stream, ``[B, T, C]`` each: ``OWN``, and keys and values (:func:`shared`)."""


def shared(layer: int) -> str:
    """The name of a layer's keys and values."""
    return f"keys and values of layer {layer}"


class StateLayout:
    """How the state in front of block ``index`` and that behind it are made up."""

    def __init__(self, decoder: Decoder, index: int):
        gate = decoder.layers[index].input_gate
        own = {} if gate is None else {OWN: gate.width}
        self._stream = decoder.hidden
        self._before = {shared(i): width for i, width in decoder.shared_widths(index).items()} | own
        self._behind = [shared(i) for i in decoder.shared_widths(index + 1)]

    def keeps(self, name: str) -> bool:
        """Whether later blocks read it."""
        return name in self._behind

    def split(self, state: Tensor) -> tuple[Tensor, Beside]:
        """The stream ``[B, T, d]``, and what stands beside it."""
        if not self._before:
            return state, {}
        stream, *parts = state.split((self._stream, *self._before.values()), -1)
        return stream, dict(zip(self._before, parts, strict=True))

    def join(self, stream: Tensor, beside: Beside) -> Tensor:
        """The state behind the block."""
        return torch.cat((stream, *(beside[name] for name in self._behind)), -1) if self._behind else stream


class Read(Protocol):
    """Reads a tensor by full name: all of it, or some rows or columns."""

    def __call__(self, name: str, rows: Tensor | None = None, columns: slice | None = None) -> Tensor: ...


class TokenInputs:
    """The inputs that every block has of its own, by token; in models that have none, ``join`` changes nothing.

    ``read`` gives tensors by full name. Of the table it is asked for the rows of tokens that were seen, and for one
    block's columns.
    """

    def __init__(self, decoder: Decoder, read: Read):
        self._decoder, self._read = decoder, read

    def join(self, index: int, state: Tensor, tokens: Tensor, embedded: Callable[[], Tensor]) -> Tensor:
        """The ``state`` ``[B, T, W]`` of ``tokens`` ``[B, T]`` as block ``index`` takes it; ``embedded``: the tokens'
        embeddings ``[B, T, d]``, scaled, which is the state in front of the first block."""
        if self._decoder.per_layer is None:
            return state
        own = self._inputs(self._decoder.per_layer, index, tokens, embedded().to(state.device).float())
        return torch.cat((state, own.to(state.dtype)), -1)

    @torch.no_grad()
    def _inputs(self, settings: PerLayerEmbedding, index: int, tokens: Tensor, embedded: Tensor) -> Tensor:
        """p ``[B, T, e]`` of block ``index``."""
        device, norm = embedded.device, settings.norm
        own = slice(index * settings.width, (index + 1) * settings.width)
        projection = self._read(settings.projection, torch.arange(own.start, own.stop)).float().to(device)
        gain = self._read(f"{norm.name}.weight").float().to(device)
        context = normed(embedded @ projection.T * self._decoder.hidden**-0.5, norm, gain)
        seen, places = tokens.cpu().unique(return_inverse=True)
        table = self._read(settings.table, seen, own).float()[places].to(device)
        return (context + table * settings.width**0.5) * 2**-0.5


def without_own(decoder: Decoder, index: int, x: Tensor) -> Tensor:
    """A tensor ``[B, T, …]`` like what block ``index`` takes, such as its gradient, without the block's own input."""
    return x[..., : decoder.state_width(index)]
