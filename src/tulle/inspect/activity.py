"""What of a model a token reads: inputs that are not zero, weights behind them, and how much of that neighbours share.

An input of a linear is *active* if it is not zero where the weights read it (after transforms, rounding and the
selection). A weight is active if it is stored (not zero) and its input is active; the head and one row of the embedding
(and of the table of inputs by layer) are read by every token. The *overlap* of a token with the one before it is the
share of its active inputs that were active there too. If tokens chose independently, each channel at its own rate p_j,
it would be Σp_j²/Σp_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.activity import Counter, columns_of
from tulle.hf.packed_linear import PackedLinear
from tulle.models.batches import batched
from tulle.models.description import LinearGroup, describe


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``weights``, ``active`` ones per token and ``sparsity``, the share of the weights that a token does not read."""
    weights, active = (sum(row[key] for row in rows) for key in ("weights", "active"))
    return {"weights": weights, "active": active, "sparsity": 1 - active / max(weights, 1)}


@torch.no_grad()
def measure_activity(
    model: Any, sequences: Sequence[Tensor], progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """``{"tokens", "rows": [{"block", "role", …}], "total", "parameters", "active_parameters"}`` of a transformers
    model, dense or loaded from a packed folder, over token ``sequences``. The rows are of :class:`Counter`."""
    shape = describe(model.config.to_dict())
    device = next(model.parameters()).device
    blocks = [model.get_submodule(layer.prefix.removesuffix(".")) for layer in shape.layers]
    counters = [
        {
            group.role: Counter(columns_of([weight_of(block.get_submodule(name)) for name in group.names]))
            for group in layer.groups
        }
        for block, layer in zip(blocks, shape.layers, strict=True)
    ]
    model.eval()
    batches = batched(sequences)
    for number, batch in enumerate(batches):
        if progress:
            progress("activity", number, len(batches))
        with ExitStack() as stack:
            for block, layer, own in zip(blocks, shape.layers, counters, strict=True):
                stack.enter_context(counting(block, layer.groups, own, batch.valid.to(device)))
            model(input_ids=batch.tokens.to(device), use_cache=False)
    rows = [
        {"block": index, "role": role} | counter.result()
        for index, own in enumerate(counters)
        for role, counter in own.items()
    ]
    found = total(rows)
    table = shape.vocabulary * shape.hidden
    by_layer, unread = sum(math.prod(size) for size in shape.per_layer_tensors().values()), 0
    if shape.per_layer is not None:
        unread = (shape.per_layer.vocabulary - 1) * shape.per_layer.width * len(shape.layers)
    return {
        "tokens": sum(map(len, sequences)),
        "rows": rows,
        "total": found,
        "parameters": found["weights"] + (table if shape.tied else 2 * table) + by_layer,
        "active_parameters": found["active"] + table + shape.hidden + by_layer - unread,
    }


def weight_of(linear: nn.Module) -> Tensor:
    """W ``[C_out, C_in]`` of a linear, packed or not."""
    weight = linear.dequantise() if isinstance(linear, PackedLinear) else linear.weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def counting(
    block: nn.Module, groups: Sequence[LinearGroup], counters: Mapping[str, Counter], valid: Tensor
) -> Iterator[None]:
    """While the block runs, the counters by role see the inputs of the groups' linears; ``valid``: bool ``[B, T]``."""

    def keep(counter: Counter) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            counter.see(module.selected(x) if isinstance(module, PackedLinear) else x, valid)

        return hook

    handles = [
        # Last of the hooks: it sees what those in front of it leave.
        block.get_submodule(group.names[0]).register_forward_pre_hook(keep(counters[group.role]))
        for group in groups
        if group.role in counters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
