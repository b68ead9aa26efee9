"""What of a model a token reads: inputs that are not zero, weights behind them, and how much of that neighbours share.

An input of a linear is *active* if it is not zero where it meets the weights (after transforms, rounding and the
selection). A weight is active if it is stored (not zero) and its input is active; the head and one row of the embedding
are read by every token. The *overlap* of a token with the one before it is the share of its active inputs that were
active there too. If tokens chose independently, each channel at its own rate p_j, it would be Σp_j²/Σp_j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tulle.hf.packed_linear import PackedLinear
from tulle.models.anatomy import Row, anatomy
from tulle.models.batches import batched


@dataclass
class Counter:
    """Counts of one input, over all tokens that were seen."""

    columns: Tensor
    """Stored weights behind each input channel ``[C]``, of all linears that read it."""
    tokens: int = 0
    active: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Of each channel, in how many tokens ``[C]``."""
    pairs: int = 0
    shared: float = 0.0
    """Σ over neighbouring tokens of |A_t ∩ A_{t−1}|/|A_t|."""

    def see(self, x: Tensor, valid: Tensor) -> None:
        """Takes inputs x ``[B, T, C]`` of the tokens that are ``valid``, bool ``[B, T]``."""
        active = (x != 0) & valid[..., None]
        self.tokens += int(valid.sum())
        self.active = self.active + active.sum((0, 1)).float()
        later, both = active[:, 1:], active[:, 1:] & active[:, :-1]
        real = valid[:, 1:] & valid[:, :-1]
        shares = both.sum(-1) / later.sum(-1).clamp(min=1)
        self.pairs += int(real.sum())
        self.shared += float(shares[real].sum())

    def result(self) -> dict[str, Any]:
        """``weights`` behind the input, ``active`` ones per token, share of zero inputs (``sparsity``), ``overlap`` of
        neighbours and what chance would give for it."""
        share = self.active / max(self.tokens, 1)
        return {
            "weights": int(self.columns.sum()),
            "active": float((self.columns.double() * share.double()).sum()),
            "sparsity": 1 - float(share.mean()),
            "overlap": self.shared / max(self.pairs, 1),
            "chance": float(share.square().sum() / share.sum().clamp(min=1e-12)),
        }


def columns_of(weights: Sequence[Tensor]) -> Tensor:
    """Non-zero weights in each column ``[C]`` of all ``[C_out, C]``."""
    return torch.stack([(weight != 0).sum(0) for weight in weights]).sum(0)


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
    shape = anatomy(model.config.to_dict())
    device = next(model.parameters()).device
    blocks = [model.get_submodule(shape.block_prefix(index).removesuffix(".")) for index in range(shape.layers)]
    counters = [
        {row.role: Counter(columns_of([weight_of(b.get_submodule(n)) for n in row.linears])) for row in shape.rows}
        for b in blocks
    ]
    model.eval()
    batches = batched(sequences)
    for number, batch in enumerate(batches):
        if progress:
            progress("activity", number, len(batches))
        with ExitStack() as stack:
            for block, own in zip(blocks, counters, strict=True):
                stack.enter_context(counting(block, shape.rows, own, batch.valid.to(device)))
            model(input_ids=batch.tokens.to(device), use_cache=False)
    rows = [
        {"block": index, "role": role} | counter.result()
        for index, own in enumerate(counters)
        for role, counter in own.items()
    ]
    found = total(rows)
    table = shape.vocabulary * shape.hidden
    return {
        "tokens": sum(map(len, sequences)),
        "rows": rows,
        "total": found,
        "parameters": found["weights"] + (table if shape.tied else 2 * table),
        "active_parameters": found["active"] + table + shape.hidden,
    }


def weight_of(linear: nn.Module) -> Tensor:
    """W ``[C_out, C_in]`` of a linear, packed or not."""
    weight = linear.dequantise() if isinstance(linear, PackedLinear) else linear.weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def counting(block: nn.Module, rows: Sequence[Row], counters: Mapping[str, Counter], valid: Tensor) -> Iterator[None]:
    """While the block runs, the counters by role see the inputs of the rows' linears; ``valid``: bool ``[B, T]``."""

    def keep(counter: Counter) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            counter.see(module.selected(x) if isinstance(module, PackedLinear) else x, valid)

        return hook

    handles = [
        # Last of the hooks: it sees what those in front of it leave.
        block.get_submodule(row.linears[0]).register_forward_pre_hook(keep(counters[row.role]))
        for row in rows
        if row.role in counters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
