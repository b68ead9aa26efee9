"""How much each linear's rounding costs, where it happens and at the end of the model.

Every linear in turn is rounded to nearest, weight per output channel and input per token, everything else being left
alone. Its *output error* is ‖ŷ − y‖²/‖y‖² at the linear, the score of ``keep_sensitive``
(Agarwalla et al. 2024); its *rise* is what the model's cross-entropy (nats per token) loses, and its *divergence* the
mean KL divergence of the next token's distribution from the dense model's. The two rankings need not agree: the
Spearman correlation says how far the cheap one can be trusted. The whole model is in memory, and so are the dense
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.grid import Grid
from tulle.core.token_grid import TokenGrid
from tulle.methods.quantize.keep_sensitive import output_error
from tulle.methods.quantize.round_to_nearest import round_to_nearest
from tulle.models.description import describe


@torch.no_grad()
def measure_sensitivity(
    model: Any,
    sequences: Sequence[Tensor],
    bits: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """``{"bits", "loss", "tokens", "linears": [{"name", "role", "block", "output_error", "loss_rise", "kl"}],
    "spearman", "spearman_loss"}``: of the output error with ``kl`` and with ``loss_rise``.

    ``model``: a dense transformers model in float32; ``sequences``: int64 ``[T]`` each. Grids are asymmetric.
    """
    shape = describe(model.config.to_dict())
    reference = [_logits(model, ids) for ids in sequences]
    tokens = sum(map(len, sequences))
    loss = sum(_loss(y, ids) for y, ids in zip(reference, sequences, strict=True))
    scored = max(tokens - len(sequences), 1)
    names = [(layer.index, name) for layer in shape.layers for name in shape.linear_names(layer.index)]
    found: list[dict[str, Any]] = []
    for number, (block, name) in enumerate(names):
        if progress:
            progress(f"sensitivity {bits} bits, block {block + 1}/{len(shape.layers)}", number, len(names))
        linear, grid = model.get_submodule(name), TokenGrid(bits, symmetric=False)
        dense = linear.weight
        inputs: list[Tensor] = []

        def before(
            module: nn.Module, arguments: tuple[Tensor, ...], seen: list[Tensor] = inputs, grid: TokenGrid = grid
        ) -> tuple[Tensor]:
            seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]))
            return (grid.fake(arguments[0]),)

        rounded = round_to_nearest(dense.float(), Grid(bits, None, False)).dequantise()
        handle = linear.register_forward_pre_hook(before)
        linear.weight = nn.Parameter(rounded.to(dense.dtype), requires_grad=False)
        rise, divergence = -loss, 0.0
        try:
            for ids, wanted in zip(sequences, reference, strict=True):
                y = _logits(model, ids)
                rise += _loss(y, ids)
                divergence += float(
                    nn.functional.kl_div(y.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
                )
        finally:
            handle.remove()
            linear.weight = dense
        found.append(
            {"name": name, "role": shape.role_of(name), "block": block,
             "output_error": output_error(dense.float(), torch.cat(inputs).float(), Grid(bits, None, False), grid),
             "loss_rise": rise / scored, "kl": divergence / tokens}
        )  # fmt: skip
    errors = [x["output_error"] for x in found]
    return {
        "bits": bits,
        "loss": loss / scored,
        "tokens": tokens,
        "linears": found,
        "spearman": spearman(errors, [x["kl"] for x in found]),
        "spearman_loss": spearman(errors, [x["loss_rise"] for x in found]),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where one of the two has no order (fewer than two, all equal)."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norm = float(ranks.square().sum(1).prod().sqrt())
    return float((ranks[0] * ranks[1]).sum()) / norm if norm > 0 else 0.0


def _ranks(values: Sequence[float]) -> Tensor:
    """Mean rank ``[n]`` float64: how many are less, and half of those that are equal."""
    v = torch.tensor(list(values), dtype=torch.float64)
    return (v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1).double() / 2


def _logits(model: Any, ids: Tensor) -> Tensor:
    """``[T, V]`` float32."""
    return model(ids[None].to(model.device)).logits[0].float()


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Σ of the cross-entropies of the next token, nats."""
    return float(nn.functional.cross_entropy(logits[:-1], ids[1:].to(logits.device), reduction="sum"))
