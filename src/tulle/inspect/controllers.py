"""What the controllers of a Scaling Transformer choose on a text, in numbers: usage, dead units, change, load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.evaluate.loading import load_model
from tulle.models.scaling_transformer import ScalingTransformerConfig, parameter_count, record_choices
from tulle.models.scaling_transformer.choices import Choices
from tulle.text.reading import Text, read_text, sequences

SHOWN_TOKENS = 32
"""Tokens whose choices are given one by one."""


@torch.no_grad()
def inspect_controllers(
    folder: Path,
    text: Text | str | None,
    *,
    separator: str | None = None,
    samples: int,
    length: int,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """``{"model", "architecture", "tokens", "text", "layers": [...]}``; see :func:`layer_statistics`.

    Text None: source of the standard library. Raises ``UserError`` for a broken model, or one without controllers.
    """
    model, tokenizer = load_model(folder, device)
    config: ScalingTransformerConfig = model.config
    if config.ff_block is None:
        raise UserError(
            f"expected a Scaling Transformer with a sparse feed-forward, found ff_block null in {folder}; "
            "its dense layers choose nothing"
        )
    if not isinstance(text, Text):
        text = _text(text, separator)
    rows = sequences(text, tokenizer, min(length, config.max_position_embeddings), samples, 0)
    with record_choices(model) as found:
        for done, row in enumerate(rows, 1):
            model(row[None].to(device), use_cache=False)
            if progress is not None:
                progress("choices", done, len(rows))
    return {
        "model": folder.name,
        "architecture": architecture(config),
        "tokens": sum(len(row) for row in rows),
        "text": [tokenizer.decode([int(token)]) for token in rows[0][:SHOWN_TOKENS]],
        "layers": [layer_statistics(choices) for choices in found.values()],
    }


def architecture(config: ScalingTransformerConfig) -> dict[str, Any]:
    """Sizes, and the weights that one token reads per layer beside those that a layer has."""
    d, d_ff, block = config.hidden_size, config.intermediate_size, config.ff_block or 1
    controller = config.controller_rank * (d + d_ff) + d_ff
    return {
        "parameters": parameter_count(config),
        "layers": config.num_hidden_layers,
        "hidden": d,
        "intermediate": d_ff,
        "block": block,
        "controller_rank": config.controller_rank,
        "qkv_modules": config.qkv_modules,
        "feed_forward_weights": 2 * d * d_ff + controller,
        "feed_forward_weights_read": 2 * d * (d_ff // block) + controller,
    }


def layer_statistics(choices: Choices) -> dict[str, Any]:
    """Of one layer:

    - ``counts`` ``[d_ff/N][N]``: tokens that chose each unit; ``dead``: units that none chose
    - ``effective_units``: 2^entropy of the usage within a block, mean over blocks; N when all are used alike
    - ``largest_share``: of tokens, that the favourite unit of a block gets, mean over blocks
    - ``variation``: standard deviation over mean of the counts; ``chance_variation``: of choices at random
    - ``changed``: share of blocks whose choice differs from the token before; ``chance_changed``: of tokens drawn in
      random order, that is with the same usage but no memory
    - ``certainty``: mean softmax of the chosen unit
    - ``shown`` ``[T][d_ff/N]``: the choices of the first sequence's first tokens
    """
    counts = choices.counts.double()
    usage = counts / choices.tokens
    entropy = -torch.special.xlogy(usage, usage).sum(-1)
    return {
        "units": choices.blocks * choices.block,
        "counts": choices.counts.tolist(),
        "dead": int((choices.counts == 0).sum()),
        "effective_units": float(entropy.exp().mean()),
        "largest_share": float(usage.amax(-1).mean()),
        "variation": float(counts.std(correction=0) / counts.mean()),
        "chance_variation": _chance_variation(choices),
        "changed": choices.changed / max(choices.pairs, 1),
        "chance_changed": float((1 - usage.square().sum(-1)).mean()),
        "certainty": choices.certainty / (choices.tokens * choices.blocks),
        "shown": _first(choices.shown),
    }


def _chance_variation(choices: Choices) -> float:
    """A count of T draws with probability 1/N has mean T/N and variance T/N·(1 − 1/N)."""
    return float(((choices.block - 1) / choices.tokens) ** 0.5)


def _first(shown: Tensor) -> Sequence[Sequence[int]]:
    found: list[list[int]] = shown[:SHOWN_TOKENS].tolist()
    return found


def _text(source: str | None, separator: str | None) -> Text:
    if source is None:
        from tulle.text.standard_library import calibration_text

        return Text(tuple(calibration_text()), False, ("source of the installed standard library",))
    return read_text([source], separator, None, 1)
