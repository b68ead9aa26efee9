"""What was written is read again, and must predict tokens as the walk left it; else it is not called done.

Of a few windows of the calibration text the walk knows the compressed model's hidden states after the last block, and
so its loss of every next token. The folder is opened anew, unpacked by the format's reader and run through the plain
decoder (:mod:`tulle.hf.packed_decoder`), one group of linears in memory at a time. d, the mean over the tokens of how
far the two losses are apart, bounds the difference of the losses' means, and errors of two tokens do not cancel in it.

How large d may be is measured. The folder runs the windows twice, the second time with every number of the stream in
front of every block, and behind the last, off by u of itself, up or down by chance. With e, the mean distance of these
two runs, d ≤ max(MARGIN·e, FLOOR) is asked for. u is what one rounding does at most:

- of the dtype that blocks compute in, where steps have changed the weights of linears alone, which the walk computes
  with as the file holds them: the two then differ in the order of sums;
- of bfloat16, 2⁻⁸, where steps fold something into gains or biases, which the walk has in float32 and the file may have
  in bfloat16, and where inputs are rounded or selected: a small error moves some of those by a whole step. It does so
  in both runs, so that e knows of it.

At most two norms and four biases of a block matter at once, and sums in another order count for two more. Eight errors
of one size that know nothing of each other are √8 < 3 of them, and MARGIN is 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulle.compression.recipe import Recipe
from tulle.errors import UserError
from tulle.hf import require_packed_tensors
from tulle.hf.packed_decoder import PackedDecoder
from tulle.methods.contract import Progress
from tulle.models.batches import Batch
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import final_norm, logits
from tulle.models.description import Decoder
from tulle.models.rotary import depends_on_length

SEQUENCES = 4
LENGTH = 512
"""Tokens of a sequence."""
MARGIN = 4.0
FLOOR = 1e-3
"""Nats per token: a tenth of a percent of the perplexity."""
ROUNDING = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
LOGITS = 1 << 25
"""Logits that are in memory at once."""
Rows = Callable[[int, int], Tensor]
"""Rows start … stop − 1 of the head ``[V, d]``, float32."""


def first_windows(model: Decoder, batches: Sequence[Batch]) -> list[Batch]:
    """The beginnings of the first sequences, batch by batch. Whole ones where a rotary table depends on the length."""
    whole = any(depends_on_length(rotary) for rotary in model.rotary.values())
    found: list[Batch] = []
    left = SEQUENCES
    for batch in batches:
        if not left:
            break
        length = batch.tokens.shape[1] if whole else LENGTH
        found.append(Batch(batch.tokens[:left, :length], batch.valid[:left, :length]))
        left -= len(found[-1].tokens)
    return found


@torch.no_grad()
def losses(
    model: Decoder, windows: Sequence[Batch], hidden: Sequence[Tensor], outer: Mapping[str, Tensor], head: Rows
) -> Tensor:
    """−log p of every next token of the windows, nats ``[N]``, of ``hidden`` ``[B, T, d]`` after the last block;
    ``outer`` has the final norm's tensors, and the head's bias, by full name."""
    states, targets = [], []
    for window, found in zip(windows, hidden, strict=True):
        real = window.valid[:, 1:]
        states.append(final_norm(model, found[:, :-1][real.to(found.device)].float(), outer))
        targets.append(window.tokens[:, 1:][real])
    x, wanted = torch.cat(states), torch.cat(targets).to(states[0].device)
    bias = outer.get(model.head.removesuffix("weight") + "bias")
    total, own = torch.full_like(wanted, -math.inf, dtype=torch.float32), torch.zeros_like(x[:, 0])
    step = max(1, LOGITS // max(1, len(x)))
    for start in range(0, model.vocabulary, step):
        stop = min(start + step, model.vocabulary)
        part = logits(model, x, head(start, stop).to(x.device), None if bias is None else bias[start:stop])
        total = torch.logaddexp(total, part.logsumexp(-1))
        inside = (wanted >= start) & (wanted < stop)
        own[inside] = part[inside, wanted[inside] - start]
    return (total - own).cpu()


def confirm(
    folder: Path,
    windows: Sequence[Batch],
    predicted: Tensor,
    device: str,
    dtype: torch.dtype,
    rounding: float = ROUNDING,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads the model in ``folder`` and compares its losses of the windows' next tokens with those ``predicted``
    (nats ``[N]``); figures for the report. ``rounding``: u.

    Raises ``UserError`` where they are too far apart or the folder cannot be read; its config.json is removed then, so
    that nobody takes it for a model.
    """
    begun = time.perf_counter()
    try:
        found, shaken = _read_again(folder, windows, device, dtype, rounding, progress)
        difference, noise = _mean((found - predicted).abs()), _mean((found - shaken).abs())
        allowed = max(MARGIN * noise, FLOOR)
        if not difference <= allowed:  # NaN is none either
            raise UserError(
                f"losses of its tokens {difference:.3g} nats from what it gave before, where rounding explains "
                f"{allowed:.2g}"
            )
    except UserError as error:
        (folder / "config.json").unlink(missing_ok=True)
        raise UserError(
            f"expected the written model to be what was compressed, found {error}; what was written is damaged: "
            "check disk and memory, and compress again"
        ) from None
    return {
        "sequences": sum(len(window.tokens) for window in windows),
        "tokens": len(found),
        "predicted_loss": _mean(predicted),
        "loss": _mean(found),
        "difference": difference,
        "allowed": allowed,
        "seconds": time.perf_counter() - begun,
    }


def rounding_of(recipe: Recipe, dtype: torch.dtype) -> float:
    """u of a recipe whose blocks compute in ``dtype``."""
    rounded = any(getattr(step.method, "input_bits", None) is not None for step in recipe.steps)
    alone = not (rounded or recipe.stage("model") or recipe.stage("block"))
    return torch.finfo(dtype).eps / 2 if alone else ROUNDING


def _mean(nats: Tensor) -> float:
    """0 where there are no tokens to predict."""
    return float(nats.double().mean()) if len(nats) else 0.0


def _read_again(
    folder: Path,
    windows: Sequence[Batch],
    device: str,
    dtype: torch.dtype,
    rounding: float,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Losses ``[N]`` of the model in the folder, and of the same with every number of the stream rounded by chance."""
    checkpoint = Checkpoint.open(folder)
    if checkpoint.packed is not None:
        require_packed_tensors(checkpoint, checkpoint.packed.linears)
    model, generator = PackedDecoder(checkpoint, device, dtype), torch.Generator().manual_seed(0)

    def rounded(hidden: Tensor) -> Tensor:
        signs = torch.randint(0, 2, hidden.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return hidden + hidden * signs.to(hidden.device, hidden.dtype) * rounding

    found = [model.embed(window.tokens) for window in windows]
    shaken = [rounded(hidden) for hidden in found]
    layers = len(model.decoder.layers)
    for index in range(layers):
        if progress:
            progress(f"read again {index + 1}/{layers}", layers, layers)  # the blocks are done: the bar stays full
        ends = model.block(index, [*found, *shaken], 2 * [window.tokens for window in windows])
        found, shaken = ends[: len(found)], [rounded(hidden) for hidden in ends[len(found) :]]
    outer = model.outer()
    both = [losses(model.decoder, windows, hidden, outer, model.head) for hidden in (found, shaken)]
    return both[0], both[1]
