"""Outliers of activations: where they are, which linears read them, and what each transform makes of them.

Two kinds (Lin et al. 2024, DuQuant, section 3):

- *normal*: a channel that is large for most tokens (Dettmers et al. 2022, LLM.int8; Xiao et al. 2023, SmoothQuant).
  Its median |x| is ``NORMAL`` times that of the median channel, and more than the median channel ever reaches.
- *massive*: a value that few tokens carry (Sun et al. 2024, Massive Activations in Large Language Models). |x| is
  ``MASSIVE`` times the median of the whole input, ``FEW`` times the largest |x| of the median token (outside normal
  channels) and ``OWN`` times the median of its channel. Sun et al. ask for the first alone, of the residual stream; the
  input of down is a product, whose tail alone would reach that.

Walks the dense model block by block; memory is one block, the hidden states and the inputs that are going to be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.rotation import greedy_rotation, zigzag
from tulle.core.token_grid import TokenGrid
from tulle.core.transform import BlockMatrix, Diagonal, Hadamard, Permutation, Transform, fold, run
from tulle.errors import UserError
from tulle.machine import require_device
from tulle.methods.contract import BlockState, GroupState, LinearState, Statistics
from tulle.methods.quantize.duquant import block_size
from tulle.methods.smoothing import group_smoothing
from tulle.models.batches import batched
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import DecoderBlock, GroupInput, embed
from tulle.models.description import LinearGroup
from tulle.models.expert_pass import outputs
from tulle.models.rewrite import DenseModel

NORMAL, MASSIVE, FEW, OWN = 8.0, 100.0, 5.0, 20.0
MOST_LISTED = 8
"""Massive values that are listed per input; all are counted."""
SHOWN_TOKENS = 256
PICTURE = (64, 96)
"""Cells of a picture, (tokens, channels); each shows the maximum of what it stands for."""
GRID = TokenGrid(4, symmetric=False)
ALPHA, BLOCK, STEPS = 0.6, 128, 256
"""DuQuant's settings: smoothing, channels that a rotation mixes, steps of the greedy search."""
CHUNK = 512
"""Tokens whose outputs are in memory at a time."""


@dataclass
class Input:
    """A group's input X ``[T, C]`` over all tokens, and what was found in it."""

    block: int
    group: LinearGroup
    x: Tensor
    facts: dict[str, Any]

    @property
    def kinds(self) -> list[str]:
        """Of the outliers that it has."""
        return [kind for kind, has in (("normal", "normal"), ("massive", "massive_values")) if self.facts[has]]


def require_dense(folder: str | Path) -> None:
    """Raises ``UserError`` for a compressed model."""
    if Checkpoint.open(folder).packed is not None:
        raise UserError(
            f"expected a dense checkpoint for --activations and --sensitivity, found {Path(folder).name} compressed; "
            "give the original model"
        )


@torch.no_grad()
def inspect_activations(
    folder: str | Path,
    sequences: Sequence[Tensor],
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    decode: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """``{"tokens", "inputs": [...], "landscapes": [...]}`` for token ``sequences`` through the dense model.

    An input has ``block``, ``role``, ``readers`` (linears) and what :func:`outliers_of` finds; a massive value also
    ``sequence`` and ``position``, token ``id`` and, with ``decode``, its ``text``. The landscapes are of the inputs
    with the largest normal and massive outliers and, of every other role, with the largest ``channel_ratio``:
    ``kinds`` (of ``normal`` and ``massive``, those that it has), ``block``, ``role``, ``readers``, |x| of each channel
    (``channel_absmax``, ``channel_median``), and ``stages`` of :func:`landscape`. Raises ``UserError`` for a compressed
    model and for a device that is not here.
    """
    require_dense(folder)
    require_device(device)
    dense = DenseModel.open(folder)
    model = dense.description
    batches = batched(sequences)
    embedding, own = dense.embedding().float(), dense.token_inputs()
    embedded = lambda batch: embed(model, batch.tokens, embedding).to(device)  # noqa: E731
    hidden = [embedded(batch) for batch in batches]
    # Tokens in the order of the batches: longest sequence first.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    places = [(i, position) for i in order for position in range(len(sequences[i]))]

    def keep(seen: Mapping[str, list[Tensor]], batch: int, given: GroupInput) -> None:
        if given.tokens is None:  # experts read what their router reads
            seen[given.role].append(given.real(given.x, batches[batch].valid.to(device)).float())

    inputs: list[dict[str, Any]] = []
    extreme: dict[str, Input] = {}
    count = len(model.layers)
    for index, layer in enumerate(model.layers):
        if progress:
            progress(f"activations {index + 1}/{count}", index, count)
        block = DecoderBlock(model, index, dense.read_block(index, experts=False), device, experts=False)
        seen: dict[str, list[Tensor]] = {group.role: [] for group in layer.groups}
        entering = [
            own.join(index, states, batch.tokens, partial(embedded, batch))
            for states, batch in zip(hidden, batches, strict=True)
        ]
        hidden = outputs(block, entering, dense.read_expert, partial(keep, seen))
        for group in layer.groups:
            x = torch.cat(seen.pop(group.role))
            facts: dict[str, Any] = {"block": index, "role": group.role}
            facts |= {"readers": [layer.prefix + name for name in group.names]} | outliers_of(x)
            for value in facts["massive"]:
                value["sequence"], value["position"] = places[value["token"]]
                value["id"] = int(sequences[value["sequence"]][value["position"]])
                if decode:
                    value["text"] = decode(value["id"])
            inputs.append(facts)
            _keep_extreme(extreme, Input(index, group, x, facts))
    landscapes = []
    chosen = _chosen(extreme)
    for number, found in enumerate(chosen):
        if progress:
            progress(f"landscape {number + 1}/{len(chosen)}", number, len(chosen))
        tensors = dense.read_block(found.block, experts=False)
        weights = [tensors[f"{name}.weight"].float().to(device) for name in found.group.names]
        size, heads = found.x.abs(), model.layers[found.block].heads
        landscapes.append(
            {"kinds": found.kinds, "block": found.block, "role": found.group.role, "readers": found.facts["readers"],
             "channel_absmax": size.amax(0).tolist(), "channel_median": size.median(0).values.tolist(),
             "stages": landscape(found.x, weights, smoothing_of(found.x, weights, found.group.role, heads))}
        )  # fmt: skip
    return {"tokens": sum(map(len, sequences)), "inputs": inputs, "landscapes": landscapes}


def _keep_extreme(extreme: dict[str, Input], found: Input) -> None:
    """The input with the largest outliers of each kind, and the most uneven one of each role."""
    scores = [(kind, f"{kind}_ratio") for kind in found.kinds] + [(found.group.role, "channel_ratio")]
    for key, score in scores:
        if key not in extreme or found.facts[score] > extreme[key].facts[score]:
            extreme[key] = found


def _chosen(extreme: dict[str, Input]) -> list[Input]:
    """The largest outliers of each kind, then the most uneven input of every role that has none of these."""
    chosen = [extreme[kind] for kind in ("normal", "massive") if kind in extreme]
    roles = {found.group.role for found in chosen}
    rest = [found for key, found in extreme.items() if key not in ("normal", "massive") and key not in roles]
    return list({id(found): found for found in (*chosen, *rest)}.values())


def outliers_of(x: Tensor) -> dict[str, Any]:
    """Normal and massive outliers of X ``[T, C]``.

    ``channels``, ``absmax``, ``median`` |x|; ``channel_ratio``: the largest channel's max|x| over the median channel's;
    ``normal_ratio``: the same of the channels' medians; ``massive_ratio``: over ``median``, the largest |x| that is
    not just what a normal channel always is. ``normal`` lists channels with ``absmax``, ``median`` and ``ratio``
    (their part of ``normal_ratio``); ``massive`` the largest values, with ``token`` (row of X), ``channel``, ``value``
    and ``ratio`` (over ``median``), all being counted in ``massive_values``, ``massive_tokens`` and
    ``massive_channels``. ``rounding_error`` is ‖x̂ − x‖²/‖x‖² in 4 bits per token.
    """
    size = x.abs()
    peaks, medians = size.amax(0), size.median(0).values
    overall, typical = (float(v.median().clamp(min=1e-12)) for v in (size, medians))
    found: dict[str, Any] = {
        "channels": x.shape[1],
        "absmax": float(peaks.max()),
        "median": overall,
        "channel_ratio": float(peaks.max() / peaks.median().clamp(min=1e-12)),
        "normal_ratio": float(medians.max()) / typical,
        "rounding_error": rounding_error(x),
    }
    least = max(NORMAL * typical, float(peaks.median()))
    normal = [j for j in medians.argsort(descending=True, stable=True).tolist() if medians[j] > least]
    found["normal"] = [
        {"channel": j, "absmax": float(peaks[j]), "median": float(medians[j]), "ratio": float(medians[j]) / typical}
        for j in normal
    ]
    often = torch.zeros_like(size, dtype=torch.bool)
    often[:, normal] = True
    token_peak = float(size.masked_fill(often, 0).amax(1).median())
    own = size > OWN * medians
    found["massive_ratio"] = float(size.masked_fill(often & ~own, 0).max()) / overall
    tokens, channels = (own & (size > max(MASSIVE * overall, FEW * token_peak))).nonzero().unbind(1)
    values = size[tokens, channels]
    found |= {
        "massive_values": len(values),
        "massive_tokens": len(tokens.unique()),
        "massive_channels": len(channels.unique()),
        "massive": [
            {"token": int(tokens[i]), "channel": int(channels[i]), "value": float(x[tokens[i], channels[i]]),
             "ratio": float(values[i]) / overall}
            for i in values.argsort(descending=True, stable=True)[:MOST_LISTED]
        ],
    }  # fmt: skip
    return found


def rounding_error(x: Tensor) -> float:
    """‖x̂ − x‖²/‖x‖² of X ``[T, C]`` in 4 bits per token, asymmetric."""
    return float((GRID.fake(x) - x).square().sum() / x.square().sum().clamp(min=1e-30))


def smoothing_of(x: Tensor, weights: Sequence[Tensor], role: str, heads: tuple[int, int, int]) -> Tensor:
    """SmoothQuant's s ``[C]`` as the recipe step finds it: for o, one value for the query heads of a KV head; ``heads``
    as in :class:`tulle.models.description.Layer`."""
    linears = [LinearState(name=str(i), weight=w, dense=w, role=role) for i, w in enumerate(weights)]
    group = GroupState(role, linears, Statistics(absmax=x.abs().amax(0)))
    block = BlockState(0, {role: group}, {}, {}, {}, *heads)
    return group_smoothing(block, role, ALPHA)


def stages_of(
    x: Tensor, smoothing: Tensor, block: int = BLOCK, steps: int = STEPS, seed: int = 0
) -> list[tuple[str, tuple[Transform, ...]]]:
    """X ``[T, C]`` as it is, smoothed by s ``[C]``, under a block Hadamard, and under DuQuant's R̂₁, R̂₁·P, R̂₁·P·R̂₂,
    as its figures 1 and 2 draw it: names and maps."""
    size = block_size(x.shape[1], block)
    generator = torch.Generator().manual_seed(seed)
    smooth = Diagonal(1 / smoothing)
    stages: list[tuple[str, tuple[Transform, ...]]] = [
        ("original", ()),
        (f"SmoothQuant, α {ALPHA}", (smooth,)),
        (f"Hadamard, blocks of {size}", (Hadamard(size),)),
    ]
    chain: tuple[Transform, ...] = (smooth,)
    for name in ("R₁", "R₁·P", "R₁·P·R₂"):
        y = run(chain, x)
        if name.endswith("P"):
            chain = (*chain, Permutation(zigzag(y.abs().amax(0), size)))
        else:
            chain = (*chain, BlockMatrix(greedy_rotation(y.reshape(-1, size), steps, generator)[0]))
        stages.append((f"DuQuant: smooth, {name}", chain))
    return stages


def landscape(
    x: Tensor, weights: Sequence[Tensor], smoothing: Tensor, block: int = BLOCK, steps: int = STEPS
) -> list[dict[str, Any]]:
    """``{"name", "picture", "peak", "rounding_error", "output_error"}`` for each of :func:`stages_of`.

    ``picture`` is |x·T| ``[tokens, channels]``, pooled, of the same tokens at every stage: those around the largest
    |x|. ``peak`` is max|x·T| over all tokens, ``output_error`` is ‖Q(x·T)·Q(W·T⁻ᵀ)ᵀ − x·Wᵀ‖²/‖x·Wᵀ‖² in 4 bits, per
    token and per output channel.
    """
    weight = torch.cat(list(weights))
    start = max(0, min(int(x.abs().amax(1).argmax()) - SHOWN_TOKENS // 2, len(x) - SHOWN_TOKENS))
    stages = []
    for name, maps in stages_of(x, smoothing, block, steps):
        y = run(maps, x)
        stages.append(
            {"name": name, "picture": pooled(y[start : start + SHOWN_TOKENS].abs(), *PICTURE).tolist(),
             "peak": float(y.abs().max()), "rounding_error": rounding_error(y),
             "output_error": _output_error(x, y, weight, fold(maps, weight))}
        )  # fmt: skip
    return stages


def _output_error(x: Tensor, y: Tensor, weight: Tensor, folded: Tensor) -> float:
    rounded = GRID.fake(folded)
    lost = total = 0.0
    for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        wanted = a @ weight.T
        lost += float((GRID.fake(b) @ rounded.T - wanted).square().sum())
        total += float(wanted.square().sum())
    return lost / max(total, 1e-30)


def pooled(picture: Tensor, rows: int, columns: int) -> Tensor:
    """The picture ``[T, C]`` with at most ``rows`` × ``columns`` cells, each the maximum of what it stands for."""
    cells = (min(rows, picture.shape[0]), min(columns, picture.shape[1]))
    return nn.functional.adaptive_max_pool2d(picture[None, None].float(), cells)[0, 0]
