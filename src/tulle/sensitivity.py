"""How much each linear's rounding costs, where it happens and at the end of the model.

Every linear in turn is rounded to nearest, weight per output channel and input per token, everything else being left
alone. Its *output error* is ‖ŷ − y‖²/‖y‖² at the linear; its *rise* is what the model's cross-entropy (nats per token)
and its logits (mean KL divergence from the dense model's) lose. The two rankings need not agree: the Spearman
correlation says how far the cheap one can be trusted. The whole model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.grid import Grid
from tulle.core.token_grid import TokenGrid
from tulle.models.anatomy import anatomy
from tulle.quantize.round_to_nearest import round_to_nearest


@torch.no_grad()
def measure_sensitivity(
    model: Any,
    sequences: Sequence[Tensor],
    bits: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """``{"bits", "loss", "linears": [{"name", "role", "block", "output_error", "loss_rise", "kl"}], "spearman"}``.

    ``model``: a dense transformers model in float32; ``sequences``: int64 ``[T]`` each.
    """
    shape = anatomy(model.config.to_dict())
    reference = [model(ids[None].to(model.device)).logits[0] for ids in sequences]
    loss = _loss(reference, sequences)
    names = [(block, name) for block in range(shape.layers) for name in shape.linears(block)]
    found: list[dict[str, Any]] = []
    for number, (block, name) in enumerate(names):
        if progress:
            progress(f"sensitivity {name}", number, len(names))
        error, logits = _with_rounded(model, name, sequences, bits)
        kl = sum(
            float(nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum"))
            for a, b in zip(logits, reference, strict=True)
        )
        found.append(
            {"name": name, "role": shape.role_of(name), "block": block, "output_error": error,
             "loss_rise": _loss(logits, sequences) - loss, "kl": kl / sum(map(len, sequences))}
        )  # fmt: skip
    return {
        "bits": bits,
        "loss": loss,
        "tokens": sum(map(len, sequences)),
        "linears": found,
        "spearman": spearman([x["output_error"] for x in found], [x["kl"] for x in found]),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties in order of appearance; 0 for fewer than two."""
    if len(a) < 2:
        return 0.0
    ranks = [torch.tensor(list(v), dtype=torch.float64).argsort(stable=True).argsort(stable=True) for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def _with_rounded(model: Any, name: str, sequences: Sequence[Tensor], bits: int) -> tuple[float, list[Tensor]]:
    """Output error of a linear that is rounded alone, and the model's logits with it."""
    linear = model.get_submodule(name)
    dense = linear.weight
    rounded = round_to_nearest(dense.float(), Grid(bits, None, False)).dequantise()
    grid = TokenGrid(bits, symmetric=False)
    lost = total = 0.0

    def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        nonlocal lost, total
        x = arguments[0]
        wanted, x = nn.functional.linear(x, dense), grid.fake(x)
        lost += float((nn.functional.linear(x, rounded) - wanted).square().sum())
        total += float(wanted.square().sum())
        return (x,)

    handle = linear.register_forward_pre_hook(before)
    linear.weight = nn.Parameter(rounded.to(dense.dtype), requires_grad=False)
    try:
        logits = [model(ids[None].to(model.device)).logits[0] for ids in sequences]
    finally:
        handle.remove()
        linear.weight = dense
    return lost / max(total, 1e-30), logits


def _loss(logits: Sequence[Tensor], sequences: Sequence[Tensor]) -> float:
    """Mean cross-entropy of the next token, nats."""
    total = sum(
        float(nn.functional.cross_entropy(y[:-1].float(), ids[1:].to(y.device), reduction="sum"))
        for y, ids in zip(logits, sequences, strict=True)
    )
    return total / max(sum(len(ids) - 1 for ids in sequences), 1)
