"""Outliers of activations: where they are, which linears read them, and what each transform makes of them.

Two kinds (Lin et al. 2024, DuQuant, section 3; Sun et al. 2024, Massive Activations in Large Language Models):

- *normal*: a channel that is large for most tokens. Its median |x| is ``NORMAL`` times that of the median channel.
- *massive*: a value that few tokens carry, ``MASSIVE`` times the median |x| of the whole input, in a channel that is
  not normal.

Walks the dense model block by block; memory is one block, the hidden states and the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.hadamard import hadamard_block
from tulle.core.rotation import greedy_rotation, zigzag
from tulle.core.smoothing import smoothing
from tulle.core.token_grid import TokenGrid
from tulle.core.transform import BlockMatrix, Diagonal, Hadamard, Permutation, Transform
from tulle.models.anatomy import Row
from tulle.models.checkpoint import Checkpoint
from tulle.models.rewrite import Source
from tulle.models.skeleton import Block, load_config
from tulle.observe import run_watched
from tulle.quantize.duquant import block_size
from tulle.streams import batched

NORMAL, MASSIVE = 8.0, 100.0
MOST_LISTED = 8
"""Massive values that are listed per input; all are counted."""
SHOWN_TOKENS = 256
GRID = TokenGrid(4, symmetric=False)


@dataclass
class Input:
    """A group's input X ``[T, C]`` over all tokens."""

    block: int
    row: Row
    x: Tensor
    weights: list[Tensor]


def inspect_activations(
    folder: str | Path,
    sequences: Sequence[Tensor],
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """``{"inputs": [...], "landscapes": [...], "tokens"}`` for token ``sequences`` through the dense model.

    An input has ``block``, ``role``, ``readers`` (linears), ``channel_ratio`` (largest channel maximum over the median
    one's), ``normal`` (channels), ``massive_values`` (how many), ``massive`` (the largest, with token and channel) and
    ``rounding_error``, ‖x̂ − x‖²/‖x‖² of 4 bits per token. The landscapes are those of the most extreme input of each
    kind: stages with a name, the picture |x| ``[tokens, channels]``, its peak and its rounding error.
    """
    checkpoint = Checkpoint.open(folder)
    model = checkpoint.anatomy()
    config = load_config(Path(folder))
    source = Source(checkpoint, model)
    batches = batched(sequences)
    embedding = source.embedding().float()
    hidden = [nn.functional.embedding(b.tokens, embedding).to(device) for b in batches]
    found: list[dict[str, Any]] = []
    extreme: dict[str, tuple[float, Input]] = {}
    for index in range(model.layers):
        if progress:
            progress(f"activations {index + 1}/{model.layers}", index, model.layers)
        tensors = source.read_block(index)
        block = Block(config, index, tensors, device)
        seen: dict[str, list[Tensor]] = {row.role: [] for row in model.rows}
        with torch.no_grad():
            for i, batch in enumerate(batches):
                hidden[i], inputs = run_watched(block, hidden[i], model.rows)
                for role, x in inputs.items():
                    seen[role].append(x[batch.valid.to(device)])
        for row in model.rows:
            x = torch.cat(seen.pop(row.role))
            entry: dict[str, Any] = {"block": index, "role": row.role} | outliers_of(x)
            entry["readers"] = [model.block_prefix(index) + name for name in row.linears]
            found.append(entry)
            weights = [tensors[f"{name}.weight"].float().to(device) for name in row.linears]
            for kind, score in (("normal", _normal_score(x)), ("massive", _massive_score(x, entry["normal"]))):
                if kind not in extreme or score > extreme[kind][0]:
                    extreme[kind] = (score, Input(index, row, x, weights))
    landscapes = [
        {"kind": kind, "block": found_input.block, "role": found_input.row.role} | {"stages": landscape(found_input)}
        for kind, (_, found_input) in extreme.items()
    ]
    return {"inputs": found, "landscapes": landscapes, "tokens": sum(map(len, sequences))}


def outliers_of(x: Tensor) -> dict[str, Any]:
    """Normal and massive outliers of X ``[T, C]``."""
    size = x.abs()
    peaks, medians = size.amax(0), size.median(0).values
    typical = float(medians.median().clamp(min=1e-12))
    normal = (medians > NORMAL * typical).nonzero()[:, 0].tolist()
    overall = float(size.median().clamp(min=1e-12))
    massive = size > MASSIVE * overall
    massive[:, normal] = False
    tokens, channels = massive.nonzero().unbind(1)
    values = size[tokens, channels]
    order = values.argsort(descending=True)[:MOST_LISTED]
    return {
        "channel_ratio": float(peaks.max() / peaks.median().clamp(min=1e-12)),
        "normal": normal,
        "massive_values": len(values),
        "massive_tokens": len(tokens.unique()),
        "massive": [
            {"token": int(tokens[i]), "channel": int(channels[i]), "value": float(x[tokens[i], channels[i]]),
             "ratio": float(values[i]) / overall}
            for i in order
        ],
        "rounding_error": rounding_error(x),
    }  # fmt: skip


def rounding_error(x: Tensor) -> float:
    """‖x̂ − x‖²/‖x‖² of X ``[T, C]`` in 4 bits per token, asymmetric."""
    return float((GRID.fake(x) - x).square().sum() / x.square().sum().clamp(min=1e-30))


def landscape(found: Input, block: int = 128, steps: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """The input as it is, smoothed, under a block Hadamard, and under DuQuant's R̂₁, R̂₁·P and R̂₁·P·R̂₂, as its figures
    1 and 2 draw it: ``{"name", "picture", "peak", "output_error"}`` each.

    ``output_error`` is ‖Q(x·T)·Q(W·T⁻ᵀ)ᵀ − x·Wᵀ‖²/‖x·Wᵀ‖² with 4 bits for both.
    """
    x = found.x
    columns = x.shape[1]
    weight = torch.cat(found.weights)
    size = block_size(columns, block)
    generator = torch.Generator().manual_seed(seed)
    smooth: Transform = Diagonal(1 / smoothing(x.abs().amax(0), weight.abs().amax(0), 0.6))
    chain: list[Transform] = [smooth]
    stages: list[tuple[str, list[Transform]]] = [
        ("original", []),
        ("SmoothQuant", [smooth]),
        (f"Hadamard, {hadamard_block(columns)} channels", [Hadamard(hadamard_block(columns))]),
    ]
    y = smooth.apply(x)
    first, _ = greedy_rotation(y.reshape(-1, size), steps, generator)
    chain.append(BlockMatrix(first))
    stages.append(("DuQuant: smooth, R₁", list(chain)))
    y = chain[-1].apply(y)
    chain.append(Permutation(zigzag(y.abs().amax(0), size)))
    stages.append(("DuQuant: smooth, R₁·P", list(chain)))
    y = chain[-1].apply(y)
    second, _ = greedy_rotation(y.reshape(-1, size), steps, generator)
    chain.append(BlockMatrix(second))
    stages.append(("DuQuant: smooth, R₁·P·R₂", list(chain)))
    return [_stage(name, maps, x, weight) for name, maps in stages]


def _stage(name: str, maps: list[Transform], x: Tensor, weight: Tensor) -> dict[str, Any]:
    wanted = x @ weight.T
    for transform in maps:
        x, weight = transform.apply(x), transform.fold(weight)
    found = GRID.fake(x) @ GRID.fake(weight).T
    peak = x.abs().amax(1).argmax()
    start = int(max(0, min(int(peak) - SHOWN_TOKENS // 2, len(x) - SHOWN_TOKENS)))
    return {
        "name": name,
        "picture": pooled(x[start : start + SHOWN_TOKENS].abs(), 64, 96).tolist(),
        "peak": float(x.abs().max()),
        "output_error": float((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)),
    }


def pooled(picture: Tensor, rows: int, columns: int) -> Tensor:
    """The picture ``[T, C]`` with at most ``rows`` × ``columns`` cells, each the maximum of what it stands for."""
    cells = (min(rows, picture.shape[0]), min(columns, picture.shape[1]))
    return nn.functional.adaptive_max_pool2d(picture[None, None].float(), cells)[0, 0]


def _normal_score(x: Tensor) -> float:
    medians = x.abs().median(0).values
    return float(medians.max() / medians.median().clamp(min=1e-12))


def _massive_score(x: Tensor, normal: Sequence[int]) -> float:
    size = x.abs()
    peaks = size.amax(0)
    peaks[list(normal)] = 0
    return float(peaks.max() / size.median().clamp(min=1e-12))
